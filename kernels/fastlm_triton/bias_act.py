"""bias_act: y = dropout(act(x + bias)) over the last axis.

Forward writes one tile per program. Backward starts from x again: dx = act'(x + bias) * dropout's factor *
dy; a program goes down a block of rows in one band of columns and keeps dbias = sum(dx) in registers; a
second kernel adds the blocks up. Bound by bytes: x (and dy) are read once, y (dx) is written once, and 4
bytes a column and block go to dbias and back.
Source: Hendrycks, Gimpel, https://arxiv.org/abs/1606.08415; the mask: _philox.py.
"""

import torch
import triton
import triton.language as tl

from ._activations import activated, activated_backward
from ._config import cdiv, config_for
from ._launch import launch
from ._rows import (
    add_up,
    as_rows,
    column_sum_rows,
    dropout_of,
    elementwise_config,
    given,
    keep_scales,
    output_like,
    parameter,
    parameter_gradient,
    partials_config,
    tile_of,
)


@triton.jit(do_not_specialize=["rows", "threshold"])
def bias_act_forward(
    x, x_stride, bias, y, rows, cols, seed, threshold: tl.uint32, scale, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    first_row, first_col = tile_of(cols, ROWS, COLS)
    row, col = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    z = tl.load(x + row[:, None] * x_stride + col[None, :], inside, 0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + col, col < cols, 0.0).to(tl.float32)[None, :]
    v = activated(z, ACTIVATION)
    if seed is not None:
        v *= keep_scales(seed, first_col, row, threshold, scale, COLS)
    tl.store(y + row[:, None] * cols + col[None, :], v.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "each", "threshold"])
def bias_act_backward(
    dy, dy_stride, x, x_stride, bias, dx, partials, rows, cols, each, seed, threshold: tl.uint32, scale,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A block of rows in one band of columns: dx, and partials[block] = sum(dx) if they are not None."""
    block, first_col = tile_of(cols, 1, COLS)
    col = first_col + tl.arange(0, COLS)
    in_cols = (col < cols)[None, :]
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, each, ROWS):
        row = block * each + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_cols
        z = tl.load(x + row[:, None] * x_stride + col[None, :], inside, 0.0).to(tl.float32)
        g = tl.load(dy + row[:, None] * dy_stride + col[None, :], inside, 0.0).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + col, col < cols, 0.0).to(tl.float32)[None, :]
        if seed is not None:
            g *= keep_scales(seed, first_col, row, threshold, scale, COLS)
        g = activated_backward(z, g, ACTIVATION)[1]
        if partials is not None:
            sums += g
        if dx is not None:
            tl.store(dx + row[:, None] * cols + col[None, :], g.to(dx.dtype.element_ty), inside)
    if partials is not None:
        tl.store(partials + block * cols + col, tl.sum(sums, 0), col < cols)


def forward(x, bias, activation, dropout_p, seed):
    """y, contiguous."""
    y = output_like(x)
    if y.numel() == 0:
        return y
    cols = x.shape[-1] if x.dim() else 1
    rows = y.numel() // cols
    config = config_for(elementwise_config, x.device, rows, cols)
    height, width = config.block
    launch(
        bias_act_forward, (cdiv(rows, height) * cdiv(cols, width),),
        *as_rows(x), parameter(bias), y, rows, cols, *dropout_of(dropout_p, seed), activation, height, width,
        num_warps=config.warps,
    )  # fmt: skip
    return y


def backward(dy, x, bias, activation, dropout_p, seed, needs):
    """(dx, dbias), contiguous, those not wanted empty."""
    cols = x.shape[-1] if x.dim() else 1
    dx, dbias = output_like(x, needs[0]), parameter_gradient(bias, x, needs[1])
    if x.numel() == 0:
        return dx, dbias.zero_()
    rows = x.numel() // cols
    config = config_for(elementwise_config, x.device, rows, cols)
    height, width = config.block
    across = cdiv(cols, width)
    each = column_sum_rows(rows, across, height) if needs[1] else height
    blocks = cdiv(rows, each)
    partials = x.new_empty((blocks, 1, cols), dtype=torch.float32) if needs[1] else None
    launch(
        bias_act_backward, (blocks * across,),
        *as_rows(dy), *as_rows(x), parameter(bias), given(dx), partials, rows, cols, each,
        *dropout_of(dropout_p, seed), activation, height, width, num_warps=config.warps,
    )  # fmt: skip
    if needs[1]:
        add_up(partials, [dbias], config_for(partials_config, x.device))
    return dx, dbias
