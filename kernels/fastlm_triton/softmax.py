"""softmax: y = e / sum(e), e = exp(s - max(s)), s = scale * x, -inf where masked; 0 where s is nothing else.

A program holds a row, or several short ones, in registers from its one read to its one write; rows too long
for that are read twice, the second time from the second-level cache, with maximum and sum kept as they grow
(Milakov, Gimelshein, "Online normalizer calculation for softmax", https://arxiv.org/abs/1805.02867). What
causal excludes is not read. Backward: dx = scale * y * (dy - sum(dy * y)).
Bound by bytes: x (and the mask) read, y written; dy and y read, dx written.
Source: Vaswani et al., section 3.2.1, https://arxiv.org/abs/1706.03762.
"""

import triton
import triton.language as tl

from ._config import Config, cdiv, config_for, next_power_of_2
from ._launch import launch
from ._rows import SUMS_ALIKE, as_rows, output_like


def softmax_config(arch: int, cols: int) -> Config:
    """(rows, columns) of the tile: a whole row, several short ones, or 4096 columns of one too long.

    16 elements a thread, so that 32 warps and their 64 registers hold 16384 columns of both dy and y; 8 in
    short rows, so that 4 warps have work for all.
    """
    width = max(next_power_of_2(cols), 4)
    if width > 16384:
        return Config((1, 4096), warps=8)
    return Config((max(1024 // width, 1), width), warps=max(width // 512, 4))


@triton.jit
def vector_of(x):
    """Elements of 16 bytes."""
    return 128 // x.dtype.element_ty.primitive_bitwidth


@triton.jit
def attended(row, col, rows, cols, VECTOR: tl.constexpr, CAUSAL: tl.constexpr):
    """(what may be read, what counts) of rows [R] and columns [C]: boolean [R, C] each.

    They differ in the last vector of a causal row: whole, it is one access of 16 bytes.
    """
    row = row.to(rows.dtype)  # 32 bits where they do: dividing 64 takes several times as long
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    if CAUSAL:
        last = (row % cols)[:, None]
        return inside & ((col // VECTOR * VECTOR)[None, :] <= last), inside & (col[None, :] <= last)
    return inside, inside


@triton.jit
def kept(row, col, inside, rows, mask, sizes, strides, col_stride, TOGETHER: tl.constexpr):
    """The mask of rows [R] and columns [C], False outside: boolean [R, C].

    sizes, strides: of its leading axes, innermost first. TOGETHER: how many columns lie side by side and are
    read at once: as many as of x, for with the 16 that 16 bytes are, threads would own other columns than x's
    accesses like best, and exchange them before y is stored.
    """
    row = row.to(rows.dtype)
    start = (row * 0).to(tl.int64)
    for k in tl.static_range(len(sizes)):
        start += (row % sizes[k]).to(tl.int64) * strides[k]
        row = row // sizes[k]
    at = start[:, None] + col[None, :].to(tl.int64) * col_stride
    if TOGETHER > 1:
        at = tl.max_contiguous(at, [1, TOGETHER])
    return tl.load(mask + at, inside, 0).to(tl.int1)


@triton.jit
def scores(
    x, x_stride, scale, mask, sizes, strides, col_stride, row, col, rows, cols, TOGETHER: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """scale * x, -inf where excluded, of rows [R] and columns [C]."""
    inside, counts = attended(row, col, rows, cols, vector_of(x), CAUSAL)
    s = tl.load(x + row[:, None] * x_stride + col[None, :], inside, 0.0).to(tl.float32) * scale
    if mask is not None:
        counts = counts & kept(row, col, inside, rows, mask, sizes, strides, col_stride, TOGETHER)
    return tl.where(counts, s, -float("inf"))


@triton.jit(do_not_specialize=["rows"])
def softmax_forward(
    x, x_stride, scale, mask, sizes, strides, col_stride, y, rows, cols, TOGETHER: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A row, or several short ones."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    s = scores(x, x_stride, scale, mask, sizes, strides, col_stride, row, col, rows, cols, TOGETHER, CAUSAL)
    highest = tl.max(s, 1)
    e = tl.exp(s - tl.where(highest == -float("inf"), 0.0, highest)[:, None])
    total = tl.sum(e, 1)
    e *= tl.where(total == 0.0, 0.0, tl.div_rn(1.0, total))[:, None]
    written = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(y + row[:, None] * cols + col[None, :], e.to(y.dtype.element_ty), written)


@triton.jit(do_not_specialize=["rows"])
def softmax_forward_long(
    x, x_stride, scale, mask, sizes, strides, col_stride, y, rows, cols, TOGETHER: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One row: maximum and sum of every column of the tile, joined after the first reading."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    last = tl.program_id(0) % cols + 1 if CAUSAL else cols
    highest = tl.full([1, COLS], -float("inf"), tl.float32)
    total = tl.zeros([1, COLS], tl.float32)
    for start in range(0, last, COLS):
        col = start + tl.arange(0, COLS)
        s = scores(
            x, x_stride, scale, mask, sizes, strides, col_stride, row, col, rows, cols, TOGETHER, CAUSAL
        )  # fmt: skip
        higher = tl.maximum(highest, s)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.exp(s - shift)
        highest = higher
    top = tl.max(highest, 1)
    shift = tl.where(top == -float("inf"), 0.0, top)[:, None]
    total = tl.sum(total * tl.exp(highest - shift), 1)
    inverse = tl.where(total == 0.0, 0.0, tl.div_rn(1.0, total))[:, None]
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        s = scores(
            x, x_stride, scale, mask, sizes, strides, col_stride, row, col, rows, cols, TOGETHER, CAUSAL
        )  # fmt: skip
        e = tl.exp(s - shift) * inverse
        tl.store(y + row[:, None] * cols + col[None, :], e.to(y.dtype.element_ty), (col < cols)[None, :])


@triton.jit
def gradients(dy, dy_stride, y, y_stride, row, col, rows, cols, CAUSAL: tl.constexpr):
    """(dy, y), 0 where excluded, of rows [R] and columns [C]."""
    inside, counts = attended(row, col, rows, cols, vector_of(y), CAUSAL)
    p = tl.load(y + row[:, None] * y_stride + col[None, :], inside, 0.0).to(tl.float32)
    g = tl.load(dy + row[:, None] * dy_stride + col[None, :], inside, 0.0).to(tl.float32)
    return tl.where(counts, g, 0.0), p


@triton.jit(do_not_specialize=["rows"])
def softmax_backward(
    dy, dy_stride, y, y_stride, scale, dx, rows, cols, CAUSAL: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """A row, or several short ones."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    g, p = gradients(dy, dy_stride, y, y_stride, row, col, rows, cols, CAUSAL)
    d = scale * p * (g - tl.sum(g * p, 1)[:, None])
    written = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(dx + row[:, None] * cols + col[None, :], d.to(dx.dtype.element_ty), written)


@triton.jit(do_not_specialize=["rows"])
def softmax_backward_long(
    dy, dy_stride, y, y_stride, scale, dx, rows, cols, CAUSAL: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    last = tl.program_id(0) % cols + 1 if CAUSAL else cols
    sums = tl.zeros([1, COLS], tl.float32)
    for start in range(0, last, COLS):
        col = start + tl.arange(0, COLS)
        g, p = gradients(dy, dy_stride, y, y_stride, row, col, rows, cols, CAUSAL)
        sums += g * p
    total = tl.sum(sums, 1)[:, None]
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        g, p = gradients(dy, dy_stride, y, y_stride, row, col, rows, cols, CAUSAL)
        d = scale * p * (g - total)
        tl.store(dx + row[:, None] * cols + col[None, :], d.to(dx.dtype.element_ty), (col < cols)[None, :])


def joined(mask):
    """(sizes, strides) of the mask's leading axes, innermost first; neighbours of one stride are joined."""
    sizes, strides = [], []
    for size, stride in zip(mask.shape[-2::-1], mask.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        if sizes and stride == strides[-1] * sizes[-1]:
            sizes[-1] *= size
        else:
            sizes.append(size)
            strides.append(stride)
    return tuple(sizes), tuple(strides)


def forward(x, scale, mask, causal):
    """y, contiguous. mask: a view of x's shape, read in place however it broadcasts."""
    y = output_like(x)
    if y.numel() == 0:
        return y
    cols = x.shape[-1] if x.dim() else 1
    rows = y.numel() // cols
    keep, together = (None, (), (), 0), 1
    if mask is not None:
        keep = (mask, *joined(mask), mask.stride(-1) if mask.dim() else 0)
        together = 16 // x.element_size() if keep[3] == 1 else 1
    config = config_for(softmax_config, x.device, cols)
    kernel = softmax_forward if config.block[1] >= cols else softmax_forward_long
    launch(
        kernel, (cdiv(rows, config.block[0]),),
        *as_rows(x), scale, *keep, y, rows, cols, together, causal, *config.block, num_warps=config.warps,
        **SUMS_ALIKE,
    )  # fmt: skip
    return y


def backward(dy, y, scale, causal):
    """dx, contiguous."""
    dx = output_like(y)
    if dx.numel() == 0:
        return dx
    cols = y.shape[-1] if y.dim() else 1
    rows = dx.numel() // cols
    config = config_for(softmax_config, y.device, cols)
    kernel = softmax_backward if config.block[1] >= cols else softmax_backward_long
    launch(
        kernel, (cdiv(rows, config.block[0]),),
        *as_rows(dy), *as_rows(y), scale, dx, rows, cols, causal, *config.block, num_warps=config.warps,
        **SUMS_ALIKE,
    )  # fmt: skip
    return dx
