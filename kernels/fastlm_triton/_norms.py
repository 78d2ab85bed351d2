"""The kernels of the norms: layer_norm is CENTERED, rms_norm is the same around 0, without a bias."""

import torch
import triton
import triton.language as tl

from ._config import Config, config_for
from ._rows import (
    add_up,
    as_rows,
    dropout_of,
    given,
    keep_scales,
    output_like,
    parameter,
    partials_config,
    row_blocks,
)


def norm_forward_config(arch: int, cols: int) -> Config:
    """(rows, columns) of the tile: a whole row, or several short ones.

    16 elements a thread: two 16-byte loads of half precision, four of float32, and 3 x 16 registers for h,
    weight and bias. 2048 at least, the work of 4 warps.
    """
    width = max(triton.next_power_of_2(cols), 4)
    height = max(2048 // width, 1)
    return Config((height, width), warps=min(max(height * width // 512, 1), 16))


def norm_backward_config(arch: int, cols: int) -> Config:
    """(rows, columns): as forward; beside dy, h and weight a thread keeps 2 x 16 sums of gradients."""
    return norm_forward_config(arch, cols)


@triton.jit(do_not_specialize=["rows", "threshold"])
def norm_forward(
    x, x_stride, residual, residual_stride, weight, bias, y, h, mean_out, rstd_out, rows, cols, eps,
    weight_offset, seed, threshold: tl.uint32, scale, CENTERED: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
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
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(n * n, 1), tl.cast(cols, tl.float32)) + eps))
    tl.store(rstd_out + row, rstd, row < rows)
    n *= rstd[:, None]
    if weight is not None:
        n *= (tl.load(weight + col, col < cols, 0.0).to(tl.float32) + weight_offset)[None, :]
    if bias is not None:
        n += tl.load(bias + col, col < cols, 0.0).to(tl.float32)[None, :]
    tl.store(y + at, n.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "each", "threshold"])
def norm_backward(
    dy, dy_stride, dh, dh_stride, h, h_stride, weight, mean_in, rstd_in, dx, dresidual, partials, rows,
    cols, each, weight_offset, seed, threshold: tl.uint32, scale, CENTERED: tl.constexpr,
    DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, COLS)
    in_cols = (col < cols)[None, :]
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, each, ROWS):
        row = block * each + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_cols
        gradient = tl.zeros([ROWS, COLS], tl.float32)
        if dy is not None:
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
            if weight is not None:
                d *= (tl.load(weight + col, col < cols, 0.0).to(tl.float32) + weight_offset)[None, :]
            gradient = d - n * (tl.sum(d * n, 1) / cols)[:, None]
            if CENTERED:
                gradient -= (tl.sum(d, 1) / cols)[:, None]
            gradient *= rstd[:, None]
        if dh is not None:
            gradient += tl.load(dh + row[:, None] * dh_stride + col[None, :], inside, 0.0).to(tl.float32)
        at = row[:, None] * cols + col[None, :]
        if dresidual is not None:
            tl.store(dresidual + at, gradient.to(dresidual.dtype.element_ty), inside)
        if dx is not None:
            if seed is not None:
                gradient *= keep_scales(seed, 0, row, threshold, scale, COLS)
            tl.store(dx + at, gradient.to(dx.dtype.element_ty), inside)
    sums = partials + block * (DWEIGHT + DBIAS) * cols + col
    if DWEIGHT:
        tl.store(sums, tl.sum(dweight, 0), col < cols)
    if DBIAS:
        tl.store(sums + DWEIGHT * cols, tl.sum(dbias, 0), col < cols)


@triton.jit(do_not_specialize=["rows", "threshold"])
def norm_forward_long(
    x, x_stride, residual, residual_stride, weight, bias, y, h, mean_out, rstd_out, rows, cols, eps,
    weight_offset, seed, threshold: tl.uint32, scale, CENTERED: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mean, squares = 0.0, 0.0
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = col < cols
        n = tl.load(x + row * x_stride + col, inside, 0.0).to(tl.float32)
        if seed is not None:
            n *= tl.reshape(keep_scales(seed, start, row + tl.arange(0, 1), threshold, scale, COLS), [COLS])
        if residual is not None:
            n += tl.load(residual + row * residual_stride + col, inside, 0.0).to(tl.float32)
        if h is not None:
            rounded = n.to(h.dtype.element_ty)
            tl.store(h + row * cols + col, rounded, inside)
            n = rounded.to(tl.float32)
        if CENTERED:
            count = tl.minimum(cols - start, COLS).to(tl.float32)
            block_mean = tl.sum(n, 0) / count
            n = tl.where(inside, n - block_mean, 0.0)
            delta, all = block_mean - mean, start + count
            mean += delta * (count / all)
            squares += delta * delta * (start * count / all)
        squares += tl.sum(n * n, 0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / cols + eps))
    tl.store(rstd_out + row, rstd)
    if CENTERED:
        tl.store(mean_out + row, mean)
    if h is not None:
        tl.debug_barrier()  # other threads' h is read
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = col < cols
        if h is not None:
            n = tl.load(h + row * cols + col, inside, 0.0).to(tl.float32)
        else:
            n = tl.load(x + row * x_stride + col, inside, 0.0).to(tl.float32)
        n = (n - mean) * rstd
        if weight is not None:
            n *= tl.load(weight + col, inside, 0.0).to(tl.float32) + weight_offset
        if bias is not None:
            n += tl.load(bias + col, inside, 0.0).to(tl.float32)
        tl.store(y + row * cols + col, n.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "each", "threshold"])
def norm_backward_long(
    dy, dy_stride, dh, dh_stride, h, h_stride, weight, mean_in, rstd_in, dx, dresidual, partials, rows,
    cols, each, weight_offset, seed, threshold: tl.uint32, scale, CENTERED: tl.constexpr,
    DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of one row."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_in + row)
    mean = tl.load(mean_in + row) if CENTERED else 0.0
    sums = tl.zeros([COLS], tl.float32)
    products = tl.zeros([COLS], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = col < cols
        d = tl.load(dy + row * dy_stride + col, inside, 0.0).to(tl.float32)
        if weight is not None:
            d *= tl.load(weight + col, inside, 0.0).to(tl.float32) + weight_offset
        sums += d
        products += d * ((tl.load(h + row * h_stride + col, inside, 0.0).to(tl.float32) - mean) * rstd)
    d_mean = tl.sum(sums, 0) / cols if CENTERED else 0.0
    dn_mean = tl.sum(products, 0) / cols
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = col < cols
        d = tl.load(dy + row * dy_stride + col, inside, 0.0).to(tl.float32)
        if weight is not None:
            d *= tl.load(weight + col, inside, 0.0).to(tl.float32) + weight_offset
        n = (tl.load(h + row * h_stride + col, inside, 0.0).to(tl.float32) - mean) * rstd
        gradient = (d - n * dn_mean - d_mean) * rstd
        if dh is not None:
            gradient += tl.load(dh + row * dh_stride + col, inside, 0.0).to(tl.float32)
        if dresidual is not None:
            tl.store(dresidual + row * cols + col, gradient.to(dresidual.dtype.element_ty), inside)
        if dx is not None:
            if seed is not None:
                factors = keep_scales(seed, start, row + tl.arange(0, 1), threshold, scale, COLS)
                gradient *= tl.reshape(factors, [COLS])
            tl.store(dx + row * cols + col, gradient.to(dx.dtype.element_ty), inside)
def run_forward(x, weight, bias, eps, weight_offset, residual, p, seed, mean, rstd):
    """y and h of a norm; mean is None for rms_norm. rstd, mean: float32 of one element a row, written."""
    y, h = output_like(x), output_like(x, residual is not None or p > 0)
    rows = rstd.numel()
    if rows == 0:
        return y, h
    cols = x.shape[-1]
    config = config_for(norm_forward_config, x.device, cols)
    norm_forward[(triton.cdiv(rows, config.block[0]),)](
        *as_rows(x), *as_rows(residual), parameter(weight), parameter(bias), y, given(h), mean, rstd, rows, cols, eps,
        weight_offset, *dropout_of(p, seed), mean is not None, *config.block, num_warps=config.warps,
    )  # fmt: skip
    return y, h


def run_backward(dy, dh, h, weight, weight_offset, mean, rstd, p, seed, dx, dresidual, dweight, dbias):
    """Fills the gradients of a norm, those not wanted being empty."""
    rows, cols = rstd.numel(), h.shape[-1]
    wanted = [t for t in (dweight, dbias) if t.numel()]
    if rows == 0 or dy is None:
        for t in wanted:
            t.zero_()
    if rows == 0:
        return
    sums = wanted if dy is not None else []
    config = config_for(norm_backward_config, h.device, cols)
    programs, each = row_blocks(rows, config.block[0])
    partials = torch.empty((programs, len(sums), cols), dtype=torch.float32, device=h.device)
    norm_backward[(programs,)](
        *as_rows(dy), *as_rows(dh), *as_rows(h), parameter(weight), mean, rstd, given(dx),
        given(dresidual), partials, rows, cols, each, weight_offset, *dropout_of(p, seed), mean is not None,
        bool(sums) and dweight.numel() > 0, bool(sums) and dbias.numel() > 0, *config.block,
        num_warps=config.warps,
    )  # fmt: skip
    if sums:
        add_up(partials, sums, config_for(partials_config, h.device))
