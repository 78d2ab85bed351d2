"""The kernels of the norms: layer_norm is CENTERED, rms_norm is the same around 0, without a bias.

Forward: a program keeps a row of h, or several short ones, in registers between its one read of x (and
residual) and its one write of y (and h): mean, then the squares around it, are sums over registers.
Backward, with g = dy * weight and n = (h - mean) * rstd: dx = dropout's factor * dresidual,
dresidual = rstd * (g - mean(g) - n * mean(g * n)) + dh; dweight = sum(dy * n), dbias = sum(dy) over rows. A
program goes down a block of rows and keeps these sums in registers; add_partials adds the blocks up in order.
Rows too long for registers are read twice; their dweight and dbias have a kernel of their own, which reads a
third time: a block's sums of such rows fit no register file.
Bound by bytes: x (residual) in, y (h) out; dy (dh) and h in, dx (dresidual) out; 8 bytes a column and block.
"""

import torch
import triton
import triton.language as tl

from . import dropout_add
from ._config import Config, cdiv, config_for, next_power_of_2
from ._launch import launch
from ._rows import (
    SUMS_ALIKE,
    add_up,
    as_rows,
    column_sum_rows,
    dropout_of,
    elementwise_config,
    given,
    keep_scales,
    output_like,
    parameter,
    partials_config,
    row_blocks,
    tile_of,
)


def norm_forward_config(arch: int, cols: int) -> Config:
    """(rows, columns) of the tile: a whole row, several short ones, or 4096 columns of one too long.

    16 elements a thread: two 16-byte loads of half precision, four of float32; 8 in short rows, so that 4
    warps have work for all. 16384 columns at most: 32 warps have 64 registers a thread.
    """
    width = max(next_power_of_2(cols), 4)
    if width > 16384:
        return Config((1, 4096), warps=8)
    return Config((max(1024 // width, 1), width), warps=max(width // 512, 4))


# 16 warps may use all registers, and more than 128 a thread would leave only one program of 8 warps.
REGISTERS = {"maxnreg": 128}


def norm_backward_config(arch: int, cols: int, dropout: bool) -> Config:
    """(rows, columns), as forward, to 8192 columns.

    16 elements a thread of dy, n, weight and the two sums are 80 registers: 16 warps have 128, 32 only 64.
    With dropout 8 elements, to 4096 columns: 16 spill on sm_90 and sm_120. Two stages: such registers leave
    16 warps a multiprocessor, too few to wait for memory without the next rows on their way to shared memory
    (at most 98 KB: float32, 8192 columns, dh). Three for 4096 columns on an H100: 1.10 times as fast; four,
    1.13, would leave float32 one program.
    """
    width = max(next_power_of_2(cols), 4)
    if width > (4096 if dropout else 8192):
        return Config((1, 4096), warps=8)
    elements, stages = 8 if dropout else 16, 3 if arch == 90 and width == 4096 and not dropout else 2
    return Config((max(1024 // width, 1), width), warps=max(width // (32 * elements), 4), stages=stages)


@triton.jit(do_not_specialize=["rows", "threshold"])
def norm_forward(
    x, x_stride, residual, residual_stride, weight, bias, y, h, mean_out, rstd_out, rows, cols, eps,
    weight_offset, seed, threshold: tl.uint32, scale, CENTERED: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """A row, or several short ones."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    n = tl.load(x + row[:, None] * x_stride + col[None, :], inside, 0.0).to(tl.float32)
    if seed is not None:
        n *= keep_scales(seed, 0, row, threshold, scale, COLS)
    if residual is not None:
        n += tl.load(residual + row[:, None] * residual_stride + col[None, :], inside, 0.0).to(tl.float32)
    at = row[:, None] * cols + col[None, :]
    if h is not None:
        rounded = n.to(h.dtype.element_ty)
        tl.store(h + at, rounded, inside)
        n = rounded.to(tl.float32)
    if CENTERED:
        mean = tl.div_rn(tl.sum(n, 1), tl.cast(cols, tl.float32))
        n = tl.where(inside, n - mean[:, None], 0.0)
        tl.store(mean_out + row, mean, row < rows)
    rstd = inverse_root(tl.sum(n * n, 1), cols, eps)
    tl.store(rstd_out + row, rstd, row < rows)
    n *= rstd[:, None]
    if weight is not None:
        n *= (tl.load(weight + col, col < cols, 0.0).to(tl.float32) + weight_offset)[None, :]
    if bias is not None:
        n += tl.load(bias + col, col < cols, 0.0).to(tl.float32)[None, :]
    tl.store(y + at, n.to(y.dtype.element_ty), inside)


@triton.jit
def inverse_root(squares, cols, eps):
    """1 / sqrt(squares / cols + eps): all y's factor, so to the last bit but for the first division's two."""
    return tl.div_rn(1.0, tl.sqrt_rn(squares / cols + eps))


@triton.jit(do_not_specialize=["rows", "threshold"])
def norm_forward_long(
    x, x_stride, residual, residual_stride, weight, bias, y, h, mean_out, rstd_out, rows, cols, eps,
    weight_offset, seed, threshold: tl.uint32, scale, CENTERED: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """One row; mean and squares of its pieces are joined as Chan, Golub, LeVeque do (STAN-CS-79-773)."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    at = row[:, None] * cols
    mean = tl.zeros([1], tl.float32)
    squares = tl.zeros([1], tl.float32)
    for start in range(0, cols, COLS):
        col = (start + tl.arange(0, COLS))[None, :]
        inside = col < cols
        n = tl.load(x + row[:, None] * x_stride + col, inside, 0.0).to(tl.float32)
        if seed is not None:
            n *= keep_scales(seed, start, row, threshold, scale, COLS)
        if residual is not None:
            n += tl.load(residual + row[:, None] * residual_stride + col, inside, 0.0).to(tl.float32)
        if h is not None:
            rounded = n.to(h.dtype.element_ty)
            tl.store(h + at + col, rounded, inside)
            n = rounded.to(tl.float32)
        if CENTERED:
            count = tl.minimum(cols - start, COLS).to(tl.float32)
            block_mean = tl.div_rn(tl.sum(n, 1), count)
            n = tl.where(inside, n - block_mean[:, None], 0.0)
            delta, share = block_mean - mean, count / (start + count)
            mean += delta * share
            squares += delta * delta * (start * share)
        squares += tl.sum(n * n, 1)
    rstd = inverse_root(squares, cols, eps)
    tl.store(rstd_out + row, rstd)
    if CENTERED:
        tl.store(mean_out + row, mean)
    tl.debug_barrier()  # below a thread may read h that another one wrote
    for start in range(0, cols, COLS):
        col = (start + tl.arange(0, COLS))[None, :]
        inside = col < cols
        if h is None:
            n = tl.load(x + row[:, None] * x_stride + col, inside, 0.0).to(tl.float32)
        else:
            n = tl.load(h + at + col, inside, 0.0).to(tl.float32)
        n = (n - mean[:, None]) * rstd[:, None]
        if weight is not None:
            n *= tl.load(weight + col, inside, 0.0).to(tl.float32) + weight_offset
        if bias is not None:
            n += tl.load(bias + col, inside, 0.0).to(tl.float32)
        tl.store(y + at + col, n.to(y.dtype.element_ty), inside)


@triton.jit
def store_gradients(
    gradient, dh, dh_stride, dx, dresidual, row, first_col, inside, cols, seed, threshold, scale
):  # fmt: skip
    """Of rows [R] and the columns from first_col: adds dh, stores dresidual, drops, stores dx."""
    col = first_col + tl.arange(0, gradient.shape[1])
    if dh is not None:
        gradient += tl.load(dh + row[:, None] * dh_stride + col[None, :], inside, 0.0).to(tl.float32)
    at = row[:, None] * cols + col[None, :]
    if dresidual is not None:
        tl.store(dresidual + at, gradient.to(dresidual.dtype.element_ty), inside)
    if dx is not None:
        if seed is not None:
            gradient *= keep_scales(seed, first_col, row, threshold, scale, gradient.shape[1])
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "each", "threshold"])
def norm_backward(
    dy, dy_stride, dh, dh_stride, h, h_stride, weight, mean_in, rstd_in, dx, dresidual, partials, rows,
    cols, each, weight_offset, seed, threshold: tl.uint32, scale, CENTERED: tl.constexpr,
    DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A block of `each` rows: dx, dresidual, and its sums of dweight and dbias in partials[block]."""
    block = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, COLS)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    w = 1.0
    if weight is not None:
        w = (tl.load(weight + col, col < cols, 0.0).to(tl.float32) + weight_offset)[None, :]
    for start in tl.range(0, each, ROWS, num_stages=STAGES):
        row = block * each + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        d = tl.load(dy + row[:, None] * dy_stride + col[None, :], inside, 0.0).to(tl.float32)
        n = tl.load(h + row[:, None] * h_stride + col[None, :], inside, 0.0).to(tl.float32)
        rstd = tl.load(rstd_in + row, row < rows, 0.0)
        if CENTERED:
            n -= tl.load(mean_in + row, row < rows, 0.0)[:, None]
        n *= rstd[:, None]
        if DWEIGHT:
            dweight += d * n
        if DBIAS:
            dbias += d
        d *= w
        gradient = d - n * (tl.sum(d * n, 1) / cols)[:, None]
        if CENTERED:
            gradient -= (tl.sum(d, 1) / cols)[:, None]
        gradient *= rstd[:, None]
        store_gradients(gradient, dh, dh_stride, dx, dresidual, row, 0, inside, cols, seed, threshold, scale)
    sums = partials + block * (DWEIGHT + DBIAS) * cols + col
    if DWEIGHT:
        tl.store(sums, tl.sum(dweight, 0), col < cols)
    if DBIAS:
        tl.store(sums + DWEIGHT * cols, tl.sum(dbias, 0), col < cols)


@triton.jit(do_not_specialize=["threshold"])
def norm_backward_long(
    dy, dy_stride, dh, dh_stride, h, h_stride, weight, mean_in, rstd_in, dx, dresidual, cols,
    weight_offset, seed, threshold: tl.uint32, scale, CENTERED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of one row."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(rstd_in + row)[:, None]
    d_sums = tl.zeros([1, COLS], tl.float32)
    dn_sums = tl.zeros([1, COLS], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        d, n = weighted(dy, dy_stride, h, h_stride, weight, weight_offset, mean_in, rstd, row, col, cols)
        d_sums += d
        dn_sums += d * n
    d_mean = tl.sum(d_sums, 1)[:, None] / cols if CENTERED else 0.0
    dn_mean = tl.sum(dn_sums, 1)[:, None] / cols
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        d, n = weighted(dy, dy_stride, h, h_stride, weight, weight_offset, mean_in, rstd, row, col, cols)
        gradient = (d - n * dn_mean - d_mean) * rstd
        inside = (col < cols)[None, :]
        store_gradients(
            gradient, dh, dh_stride, dx, dresidual, row, start, inside, cols, seed, threshold, scale
        )


@triton.jit
def weighted(dy, dy_stride, h, h_stride, weight, weight_offset, mean_in, rstd, row, col, cols):
    """(dy * weight, n) of one row [1], rstd [1, 1], and some columns [C]: [1, C] each."""
    inside = (col < cols)[None, :]
    d = tl.load(dy + row[:, None] * dy_stride + col[None, :], inside, 0.0).to(tl.float32)
    n = tl.load(h + row[:, None] * h_stride + col[None, :], inside, 0.0).to(tl.float32)
    if mean_in is not None:
        n -= tl.load(mean_in + row)[:, None]
    if weight is not None:
        d *= (tl.load(weight + col, col < cols, 0.0).to(tl.float32) + weight_offset)[None, :]
    return d, n * rstd


@triton.jit(do_not_specialize=["rows", "each"])
def norm_parameter_gradients(
    dy, dy_stride, h, h_stride, mean_in, rstd_in, partials, rows, cols, each, DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sums of dweight and dbias of one block of rows in one band of columns."""
    block, first_col = tile_of(cols, 1, COLS)
    col = first_col + tl.arange(0, COLS)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, each, ROWS):
        row = block * each + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        d = tl.load(dy + row[:, None] * dy_stride + col[None, :], inside, 0.0).to(tl.float32)
        dbias += d
        if DWEIGHT:
            n = tl.load(h + row[:, None] * h_stride + col[None, :], inside, 0.0).to(tl.float32)
            if mean_in is not None:
                n -= tl.load(mean_in + row, row < rows, 0.0)[:, None]
            dweight += d * n * tl.load(rstd_in + row, row < rows, 0.0)[:, None]
    sums = partials + block * (DWEIGHT + DBIAS) * cols + col
    if DWEIGHT:
        tl.store(sums, tl.sum(dweight, 0), col < cols)
    if DBIAS:
        tl.store(sums + DWEIGHT * cols, tl.sum(dbias, 0), col < cols)


def run_forward(x, weight, bias, eps, weight_offset, residual, p, seed, mean, rstd):
    """y and h of a norm; mean is None for rms_norm. mean, rstd: float32 of one element a row, written."""
    y, h = output_like(x), output_like(x, residual is not None or p > 0)
    rows, cols = rstd.numel(), x.shape[-1]
    if rows == 0:
        return y, h
    config = config_for(norm_forward_config, x.device, cols)
    kernel = norm_forward if config.block[1] >= cols else norm_forward_long
    launch(
        kernel, (cdiv(rows, config.block[0]),),
        *as_rows(x), *as_rows(residual), parameter(weight), parameter(bias), y, given(h), mean, rstd, rows,
        cols, eps, weight_offset, *dropout_of(p, seed), mean is not None, *config.block,
        num_warps=config.warps, **SUMS_ALIKE,
    )  # fmt: skip
    return y, h


def run_backward(dy, dh, h, weight, weight_offset, mean, rstd, p, seed, dx, dresidual, dweight, dbias):
    """Fills the gradients of a norm, None where not wanted. mean is None for rms_norm."""
    rows, cols = rstd.numel(), h.shape[-1]
    outs = [t for t in (dweight, dbias) if t is not None]
    if rows == 0 or dy is None:
        for out in outs:
            out.zero_()
        return pass_on(dh, p, seed, dx, dresidual)
    read = (*as_rows(dy), *as_rows(dh), *as_rows(h))
    weighted_by, dropout = (parameter(weight), mean, rstd, dx, dresidual), dropout_of(p, seed)
    config = config_for(norm_backward_config, h.device, cols, p > 0)
    if config.block[1] < cols:
        if dx is not None or dresidual is not None:
            launch(
                norm_backward_long, (rows,),
                *read, *weighted_by, cols, weight_offset, *dropout, mean is not None, config.block[1],
                num_warps=config.warps, **SUMS_ALIKE,
            )  # fmt: skip
        partials = parameter_partials(dy, h, mean, rstd, dweight, dbias) if outs else None
    else:
        programs, each = row_blocks(rows, config.block[0])
        partials = h.new_empty((programs, len(outs), cols), dtype=torch.float32)
        launch(
            norm_backward, (programs,),
            *read, *weighted_by, partials, rows, cols, each, weight_offset, *dropout, mean is not None,
            dweight is not None, dbias is not None, *config.block, config.stages, num_warps=config.warps,
            **SUMS_ALIKE, **REGISTERS,
        )  # fmt: skip
    if outs:
        add_up(partials, outs, config_for(partials_config, h.device))


def parameter_partials(dy, h, mean, rstd, dweight, dbias):
    """The sums of dweight and dbias over each block of long rows: float32 [blocks, n, cols]."""
    rows, cols = rstd.numel(), h.shape[-1]
    config = config_for(elementwise_config, h.device, rows, cols)
    height, width = config.block
    across = cdiv(cols, width)
    each = column_sum_rows(rows, across, height)
    blocks, flags = cdiv(rows, each), (dweight is not None, dbias is not None)
    partials = h.new_empty((blocks, sum(flags), cols), dtype=torch.float32)
    launch(
        norm_parameter_gradients, (blocks * across,),
        *as_rows(dy), *as_rows(h), mean, rstd, partials, rows, cols, each, *flags, height, width,
        num_warps=config.warps,
    )  # fmt: skip
    return partials


def pass_on(dh, p, seed, dx, dresidual):
    """The gradients where only h is used, or there are no rows: dresidual is dh, dx is dropped dh."""
    if dx is not None and dx.numel():
        dx.copy_(dropout_add.backward(dh, p, seed) if p > 0 else dh)
    if dresidual is not None and dresidual.numel():
        dresidual.copy_(dh)
