"""A matrix product whose tiles meet their bias, activation or gradient before they leave the registers.

A program computes one tile of a @ b, [BLOCK_M, BLOCK_N], in float32: blocks of a and b come to shared memory
by asynchronous copies, a few blocks ahead of the tensor cores. Tiles are walked in bands of GROUP rows of
tiles, so that a and b are found in L2. With few tiles and a long k some programs share a tile: each writes
its own sum, and a second kernel adds them in order. Bound by FLOPs: 2 m n k; from memory each block of a
comes n / BLOCK_N times, of b m / BLOCK_M times at most. Source of the order of tiles:
https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html.
"""

import torch
import triton
import triton.language as tl

from ._activations import activated, activated_backward
from ._config import Config, cdiv, config_for
from ._launch import launch
from ._rows import add_up, keep_scales, partials_config


def matmul_config(arch: int, kind: str, m: int, n: int, k: int) -> Config:
    """(rows, columns, depth of a tile; tile rows of a band; programs of a tile, where its sum may be split).

    kind: of dot_kind.
    """
    small = cdiv(m, 128) * cdiv(n, 128) < 108  # fewer than an A100 has multiprocessors
    if kind == "ieee":  # FMAs: 32 sums a thread, and a row of a and a column of b beside them
        rows, cols, depth, warps, stages = (32, 32, 16, 4, 2) if small else (64, 64, 16, 4, 2)
    elif m <= 16:
        rows, cols, depth, warps, stages = 16, 64, 64, 4, 4  # bound by reading b: many programs, deep queue
    elif small:
        rows, cols, depth, warps, stages = 64, 64, 32, 4, 4
    elif arch == 90:  # per byte of shared memory wgmma gets most from 64 x 256 a warp group
        rows, cols, depth, warps, stages = 128, 256, 64, 8, 3
    elif arch == 100:  # the sums live in tensor memory
        rows, cols, depth, warps, stages = 128, 128, 64, 8, 3
    else:  # 64 x 64 a warp: two blocks an SM, of 48 KB and 252 registers a thread, hide each other's ends
        rows, cols, depth, warps, stages = 128, 128, 32, 4, 4
    if kind == "tf32":
        depth //= 2  # the same bytes
    tiles = cdiv(m, rows) * cdiv(n, cols)
    splits = max(min(128 // max(tiles, 1), k // 512), 1)  # 512: a sum costs more than writing it twice
    return Config((rows, cols, depth, 8, splits), warps, stages)


def dot_kind(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: "half", or for float32 "ieee" unless torch's own setting allows "tf32"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b. In full float32 a tile's sum is taken alone first: a sum of short sums rounds less.

    In one long sum a product over 1100 and attention's dk over 700 queries were 1.40 and 1.55 times as far
    off as the 2x rule allows. A multiply-add of 1 keeps Triton from joining the two.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        product = tl.dot(a, b, input_precision=PRECISION)
        return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def finish(
    product, row, first_col, tile_m, m, n, to, seed, threshold, scale, ACTIVATION: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Writes what becomes of the columns first_col ... of a tile [R, COLS]: see matmul_kernel."""
    out, bias, z, act, sums = to
    col = first_col + tl.arange(0, COLS)
    in_rows, in_cols = (row < m)[:, None], col < n
    inside = in_rows & in_cols[None, :]
    at = row[:, None] * n + col[None, :]
    if bias is not None:
        product += tl.load(bias + col, in_cols, 0.0).to(tl.float32)[None, :]
    if seed is not None:
        factor = keep_scales(seed, first_col, row, threshold, scale, COLS)
    if z is not None:
        if seed is not None:
            product *= factor
        value, product = activated_backward(tl.load(z + at, inside, 0.0).to(tl.float32), product, ACTIVATION)
        if sums is not None:
            kept = tl.where(in_rows, product, 0.0)  # a row past the last one: zeros times infinity are NaN
            tl.store(sums + tile_m.to(tl.int64) * n + col, tl.sum(kept, 0), in_cols)
    elif act is not None:
        product = product.to(out.dtype.element_ty)
        value = activated(product.to(tl.float32), ACTIVATION)
    if out is not None:
        tl.store(out + at, product, inside)
    if act is not None:
        if seed is not None:
            value *= factor
        tl.store(act + at, value, inside)


@triton.jit
def finish_in_parts(
    product, row, first_col, tile_m, m, n, to, seed, threshold, scale, ACTIVATION: tl.constexpr,
    COLS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """finish, PART columns at a time: what it holds beside the product has to fit in registers."""
    if COLS <= PART:
        finish(product, row, first_col, tile_m, m, n, to, seed, threshold, scale, ACTIVATION, COLS)
    else:
        HALF: tl.constexpr = COLS // 2
        left, right = tl.split(tl.permute(tl.reshape(product, [product.shape[0], 2, HALF]), (0, 2, 1)))
        finish_in_parts(
            left, row, first_col, tile_m, m, n, to, seed, threshold, scale, ACTIVATION, HALF, PART
        )
        finish_in_parts(
            right, row, first_col + HALF, tile_m, m, n, to, seed, threshold, scale, ACTIVATION, HALF, PART
        )


@triton.jit(do_not_specialize=["threshold"])
def matmul_kernel(
    a, b, out, bias, z, act, sums, m, n, k, k_each, a_row, a_col, b_row, b_col, seed, threshold: tl.uint32,
    scale, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """out [splits, m, n] = a [m, k] @ b [k, n] + bias [n]; programs: (tiles, splits of k_each).

    act [m, n]: dropout(activation(out)). With z [m, n] the product is the gradient of dropout(activation(z))
    instead: out is z's, act is computed of z, sums [tile rows, n] are out's over the rows of a tile. out, act
    and sums may then be None.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = GROUP * tiles_n
    program = tl.program_id(0)
    first = program // band * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m, tile_n = first + program % band % height, program % band // height
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tile_n.to(tl.int64) * BLOCK_N
    col = first_col + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    begin = split * k_each
    left = k - begin
    step = tl.arange(0, BLOCK_K)
    at_k = (begin + step).to(tl.int64)
    a += row[:, None] * a_row + at_k[None, :] * a_col
    b += at_k[:, None] * b_row + col[None, :] * b_col
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, min(left, k_each), BLOCK_K):
        inside = step < left - done
        x = tl.load(a, (row < m)[:, None] & inside[None, :], 0.0)
        y = tl.load(b, inside[:, None] & (col < n)[None, :], 0.0)
        product = add_product(product, x, y, PRECISION)
        a += BLOCK_K * tl.cast(a_col, tl.int64)
        b += BLOCK_K * tl.cast(b_row, tl.int64)
    if out is not None:
        out += split.to(tl.int64) * m * n
    to = (out, bias, z, act, sums)
    finish_in_parts(
        product, row, first_col, tile_m, m, n, to, seed, threshold, scale, ACTIVATION, BLOCK_N, PART
    )


def _config_of(a: torch.Tensor, b: torch.Tensor) -> Config:
    (m, k), n = a.shape, b.shape[1]
    return config_for(matmul_config, a.device, dot_kind(a.dtype), m, n, k)


def _launch(
    a, b, out, config, splits=1, *, bias=None, z=None, act=None, sums=None, activation=None,
    dropout=(None, 0, 1.0),
) -> None:  # fmt: skip
    (m, k), n = a.shape, b.shape[1]
    rows, cols, depth, band, _ = config.block
    k_each = cdiv(cdiv(k, splits), depth) * depth
    kind = dot_kind(a.dtype)
    precision = "tf32" if kind == "tf32" else "ieee"
    each = (
        8 if kind == "ieee" else 16
    )  # elements a thread: the epilogue holds four times that; FMAs hold more
    part = max(each * 32 * config.warps // rows, 16)
    launch(
        matmul_kernel, (cdiv(m, rows) * cdiv(n, cols), splits),
        a, b, out, bias, z, act, sums, m, n, k, k_each, *a.stride(), *b.stride(), *dropout, activation,
        precision, rows, cols, depth, band, part, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _matrix(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b (+ bias), contiguous. a [m, k], b [k, n], of any strides; bias [n], contiguous."""
    out, config = _matrix(a, b), _config_of(a, b)
    splits = config.block[4] if bias is None else 1
    if out.numel() == 0:
        return out
    if splits == 1:
        _launch(a, b, out, config, bias=bias)
        return out
    partials = a.new_empty((splits, 1, out.numel()), dtype=torch.float32)
    _launch(a, b, partials, config, splits)
    add_up(partials, [out.view(-1)], config_for(partials_config, a.device))
    return out


def activated_product(a, b, bias, activation: str, dropout: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, dropout(activation(z))), z = a @ b + bias rounded. dropout: of _rows.dropout_of."""
    z, act = _matrix(a, b), _matrix(a, b)
    if z.numel():
        _launch(a, b, z, _config_of(a, b), bias=bias, act=act, activation=activation, dropout=dropout)
    return z, act


def product_into_activation(a, b, z, activation: str, dropout: tuple, dz, act, dbias) -> None:
    """Where a @ b is the gradient of dropout(activation(z)): writes dz, that activation, dz's column sums.

    Each of dz, act [m, n] and dbias [n] is contiguous, or None if not wanted.
    """
    if z.numel() == 0:
        return
    config = _config_of(a, b)
    blocks, sums = cdiv(z.shape[0], config.block[0]), None
    if dbias is not None:
        sums = z.new_empty((blocks, 1, z.shape[1]), dtype=torch.float32)
    _launch(a, b, dz, config, z=z, act=act, sums=sums, activation=activation, dropout=dropout)
    if dbias is not None:
        add_up(sums, [dbias], config_for(partials_config, z.device))
