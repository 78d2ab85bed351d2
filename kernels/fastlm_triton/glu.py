"""glu: y = act(gate) * up.

Forward and backward take one tile per program; backward starts from gate and up again: dgate = dy * up *
act'(gate), dup = dy * act(gate). Bound by bytes: gate, up, dy are read once, y, dgate, dup written once.
Source: Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202.
"""

import triton
import triton.language as tl

from ._activations import activated, activated_backward
from ._config import cdiv, config_for
from ._launch import launch
from ._rows import as_rows, elementwise_config, given, output_like, tile_of


@triton.jit(do_not_specialize=["rows"])
def glu_forward(
    gate, gate_stride, up, up_stride, y, rows, cols, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Program: a tile of y."""
    first_row, first_col = tile_of(cols, ROWS, COLS)
    row, col = (first_row + tl.arange(0, ROWS))[:, None], (first_col + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < cols)
    g = tl.load(gate + row * gate_stride + col, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, inside, 0.0).to(tl.float32)
    tl.store(y + row * cols + col, activated(g, ACTIVATION) * u, inside)


@triton.jit(do_not_specialize=["rows"])
def glu_backward(
    dy, dy_stride, gate, gate_stride, up, up_stride, dgate, dup, rows, cols, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program: a tile of dgate and dup; either may be None."""
    first_row, first_col = tile_of(cols, ROWS, COLS)
    row, col = (first_row + tl.arange(0, ROWS))[:, None], (first_col + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < cols)
    d = tl.load(dy + row * dy_stride + col, inside, 0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, inside, 0.0).to(tl.float32)
    a, slope = activated_backward(g, d * u, ACTIVATION)
    if dgate is not None:
        tl.store(dgate + row * cols + col, slope, inside)
    if dup is not None:
        tl.store(dup + row * cols + col, d * a, inside)


def _launch(kernel, inputs, outputs, activation: str) -> None:
    """Over tiles of rows; of one long row where nothing is strided, so that odd rows stay aligned."""
    x = inputs[0]
    cols = x.shape[-1] if x.dim() and not all(t.is_contiguous() for t in inputs) else x.numel()
    rows = x.numel() // cols
    strided = [a for t in inputs for a in ((t, cols) if rows == 1 else as_rows(t))]
    config = config_for(elementwise_config, x.device, rows, cols)
    height, width = config.block
    grid = (cdiv(rows, height) * cdiv(cols, width),)
    launch(kernel, grid, *strided, *outputs, rows, cols, activation, height, width, num_warps=config.warps)


def forward(gate, up, activation):
    """y, contiguous."""
    y = output_like(gate)
    if y.numel():
        _launch(glu_forward, (gate, up), (y,), activation)
    return y


def backward(dy, gate, up, activation, needs):
    """(dgate, dup), contiguous, those not wanted empty."""
    dgate, dup = (output_like(gate, need) for need in needs)
    if gate.numel():
        _launch(glu_backward, (dy, gate, up), (given(dgate), given(dup)), activation)
    return dgate, dup
