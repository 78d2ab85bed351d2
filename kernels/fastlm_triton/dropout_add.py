"""dropout_add: y = dropout(x) + residual, elementwise; its backward is the same without a residual, on dy.

A program writes one tile. Bound by bytes: x and residual are read once, y is written once.
Source: Srivastava et al., "Dropout", https://jmlr.org/papers/v15/srivastava14a.html; the mask: _philox.py.
"""

import triton
import triton.language as tl

from ._config import cdiv, config_for
from ._launch import launch
from ._rows import as_rows, dropout_of, elementwise_config, keep_scales, output_like, tile_of


@triton.jit(do_not_specialize=["rows", "threshold"])
def dropout_add(
    x, x_stride, residual, residual_stride, y, rows, cols, seed, threshold: tl.uint32, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    first_row, first_col = tile_of(cols, ROWS, COLS)
    row, col = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    v = tl.load(x + row[:, None] * x_stride + col[None, :], inside).to(tl.float32)
    if seed is not None:
        v *= keep_scales(seed, first_col, row, threshold, scale, COLS)
    if residual is not None:
        v += tl.load(residual + row[:, None] * residual_stride + col[None, :], inside).to(tl.float32)
    tl.store(y + row[:, None] * cols + col[None, :], v.to(y.dtype.element_ty), inside)


def forward(x, residual, dropout_p, seed):
    """y, contiguous."""
    y = output_like(x)
    if y.numel() == 0:
        return y
    cols = x.shape[-1] if x.dim() else 1
    rows = y.numel() // cols
    config = config_for(elementwise_config, x.device, rows, cols)
    height, width = config.block
    launch(
        dropout_add, (cdiv(rows, height) * cdiv(cols, width),),
        *as_rows(x), *as_rows(residual), y, rows, cols, *dropout_of(dropout_p, seed), height, width,
        num_warps=config.warps,
    )  # fmt: skip
    return y


def backward(dy, dropout_p, seed):
    """dx, contiguous."""
    return forward(dy, None, dropout_p, seed)
