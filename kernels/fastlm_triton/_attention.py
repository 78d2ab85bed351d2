"""What the attention kernels share: which keys a query sees, what happens to a score, and their arguments.

Scores are kept in units of log 2, so that their exponential is exp2, one instruction. Query i of a sequence
sees its keys j < nk with low <= j - i <= high; tiles whose queries see all their keys skip the comparisons.
Of packed sequences, sequence b starts at row starts[b]. Strides and widths come in units of UNIT elements: so
the compiler knows what they are multiples of, without compiling again for each.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import arch_of
from ._matmul import dot_kind
from ._philox import wide_philox

_LOG2E = 1.4426950408889634
LIGHT = ("", "alibi", "packed")  # Problem.options that need few registers
_UNLIMITED = 1 << 30  # more keys than there are; with a row added it is still an int32

SCALARS = (  # arguments whose values say nothing about how to compile
    *("q_b", "q_h", "q_s", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "do_b", "do_h", "do_s"),
    *("mask_b", "mask_h", "mask_q", "mask_k", "bias_b", "bias_h", "bias_q", "bias_k", "slopes_b", "slopes_h"),
    *("heads", "group", "queries", "keys", "tokens_q", "tokens_k", "dim", "dim_v", "offset", "left", "right"),
    *("threshold", "dlse_b", "dlse_h", "dlse_s", "has_dlse", "needs_dq", "needs_dk", "needs_dv"),
    *("batch", "stat_size", "kept_b", "kept_h", "splits"),
)


def has_100_kb(arch: int) -> bool:
    """Whether a block has no more than 99 KB of shared memory; others have at least 163."""
    return arch in (86, 89) or arch >= 120


@triton.jit
def in_log2(x):
    """x in units of log 2; as a global constant the factor would be compared at every launch."""
    return x * 1.4426950408889634


@triton.jit
def tanh(x):
    """tanh to 2 ulp: a polynomial, fitted on [0, 0.625], where 1 - 2 / (e^2x + 1) would cancel."""
    y = x * x
    p = -0.3333328068 + y * (0.1333138347 + y * (-0.0537354685 + y * (0.0206267275 - y * 0.0056924275)))
    large = 1.0 - 2.0 / (tl.exp2(in_log2(tl.abs(x) * 2.0)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * y * p, tl.where(x < 0, -large, large))


@triton.jit
def _start_of(starts, b, tokens):
    """Where sequence b starts: the largest of starts[: b + 1], at most `tokens`, whatever was given."""
    found = 0
    for at in range(0, b + 1, 128):
        i = at + tl.arange(0, 128)
        found = tl.maximum(found, tl.max(tl.load(starts + i, mask=i <= b, other=0)))
    return tl.minimum(found, tokens)


@triton.jit
def sequence_of(b, queries, keys, tokens_q, tokens_k, lengths, starts_q, starts_k, offset, left, right):
    """(first_q, nq, first_k, nk, low, high): sequence b's first row and its rows in q and in k, what it sees.

    offset: of packed sequences 1 if their last query and key are aligned, 0 if the first are.
    """
    if starts_q is None:
        nq, nk, shift = queries, keys, offset
        first_q, first_k = b.to(tl.int64) * queries, b.to(tl.int64) * keys
        if lengths is not None:
            nk = tl.maximum(0, tl.minimum(keys, tl.load(lengths + b)))
    else:
        first_q, first_k = _start_of(starts_q, b, tokens_q), _start_of(starts_k, b, tokens_k)
        end_q = tl.minimum(tl.maximum(tl.load(starts_q + b + 1), first_q), tokens_q)
        end_k = tl.minimum(tl.maximum(tl.load(starts_k + b + 1), first_k), tokens_k)
        nq, nk = tl.minimum(end_q - first_q, queries), tl.minimum(end_k - first_k, keys)
        first_q, first_k = first_q.to(tl.int64), first_k.to(tl.int64)
        shift = offset * (nk - nq)
    return first_q, nq, first_k, nk, shift - left, shift + right


@triton.jit
def head_of(t, b, h, first, t_b, t_h, t_s, UNIT: tl.constexpr, PACKED: tl.constexpr):
    """(pointer to row 0 of sequence b in head h, the rows' stride)."""
    stride = t_s.to(tl.int64) * UNIT
    at = h.to(tl.int64) * t_h * UNIT
    if PACKED:
        at += first * stride
    else:
        at += b.to(tl.int64) * t_b * UNIT
    return t + at, stride


@triton.jit
def load_rows(base, stride, rows, cols, count, width, EVEN: tl.constexpr):
    """[rows, cols] of a matrix of `count` rows, 0 outside it; EVEN: `cols` are all of its `width`."""
    inside = (rows < count)[:, None]
    if not EVEN:
        inside = inside & (cols < width)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, stride, rows, cols, count, width, x, EVEN: tl.constexpr):
    """Writes x to [rows, cols] of a matrix of `count` rows of `width`, rounded to its dtype."""
    inside = (rows < count)[:, None]
    if not EVEN:
        inside = inside & (cols < width)[None, :]
    tl.store(
        base + rows.to(tl.int64)[:, None] * stride + cols[None, :], x.to(base.dtype.element_ty), mask=inside
    )


@triton.jit
def scores_of(qk, i, j, nq, nk, factor, cap, shift, slope, bias, bias_q, bias_k, RAW: tl.constexpr):
    """(scores, tanh): what scale, softcap, alibi and bias make of q.k; RAW: nothing, the exponential scales.

    i, j: of queries and keys, shaped to broadcast to qk's shape. factor: scale * log2(e), or with a cap scale
    / softcap. cap: softcap * log2(e). shift: j - i where alibi is 0. slope: times log2(e).
    """
    s = qk
    if not RAW:
        s = qk * factor
    bent = s
    if cap is not None:
        bent = tanh(s)
        s = bent * cap
    if slope is not None:
        s -= slope * tl.abs(i + shift - j).to(tl.float32)
    if bias is not None:
        at = bias + i.to(tl.int64) * bias_q + j.to(tl.int64) * bias_k
        b = tl.load(at, mask=(i < nq) & (j < nk), other=0.0).to(tl.float32)
        s = tl.where(b == float("-inf"), float("-inf"), s + in_log2(b))
    return s, bent


@triton.jit
def hide(x, fill, i, j, i0, i1, j0, j1, nq, nk, low, high, mask, mask_q, mask_k):
    """x with `fill` where query i does not see key j; i0 to i1 and j0 to j1 are all of the tile's."""
    if mask is not None:
        at = mask + i.to(tl.int64) * mask_q + j.to(tl.int64) * mask_k
        x = tl.where(tl.load(at, mask=(i < nq) & (j < nk), other=0) != 0, x, fill)
    if (j1 >= nk) | (j1 - i0 > high) | (j0 - i1 < low):
        d = j - i
        x = tl.where((j < nk) & (d >= low) & (d <= high), x, fill)
    return x


@triton.jit
def _kept(seed, row, block, head, threshold, IN_PLACE: tl.constexpr):
    """Whether dropout keeps query `row`'s weights of the keys of `block`, which broadcast: [..., 2, 2]."""
    block, row = tl.broadcast(block, row)
    head = (head + 0 * block).to(tl.uint32)
    w0, w1, w2, w3 = wide_philox(tl.load(seed), block.to(tl.uint32), row.to(tl.uint32), head, IN_PLACE)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return words >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def survivors(seed, i, j0, head, threshold, KEYS: tl.constexpr, PAIRS: tl.constexpr):
    """Whether dropout keeps the weight of query i [N] and key j0 + [0, KEYS): boolean [N, KEYS].

    PAIRS: of a product a thread holds, as of mma.sync and of wgmma, two neighbouring columns in rows r and
    r + 8. The two threads with one block's keys each compute it for one of the rows, and swap half of it.
    """
    N: tl.constexpr = i.shape[0]
    block = j0 // 4 + tl.arange(0, KEYS // 4)
    if PAIRS:
        rows = tl.permute(tl.reshape(i, [N // 16, 2, 8]), (0, 2, 1))[None, :, :, None, :]
        block = tl.reshape(block, [KEYS // 8, 2])[:, None, None, :, None]
        kept = tl.permute(_kept(seed, rows, block, head, threshold, False), (1, 4, 2, 0, 3, 5, 6))
    else:
        kept = _kept(seed, i[:, None], block[None, :], head, threshold, True)
    return tl.reshape(kept, [N, KEYS])


@triton.jit
def dropped_keys(KEYS: tl.constexpr, PAIRS: tl.constexpr):
    """[0, KEYS) in the order of survivors_of_keys: with PAIRS rows r and r + 8 are neighbours."""
    r = tl.arange(0, KEYS)
    if PAIRS:
        r = r // 16 * 16 + r % 8 * 2 + r // 8 % 2
    return r


@triton.jit
def survivors_of_keys(seed, i, j0, head, threshold, KEYS: tl.constexpr, PAIRS: tl.constexpr):
    """The same by key, j0 + dropped_keys: boolean [KEYS, N]."""
    if PAIRS:  # the two threads with a block take it for one of two neighbouring queries each
        N: tl.constexpr = i.shape[0]
        rows = tl.permute(tl.reshape(i, [N // 8, 4, 2]), (0, 2, 1))[:, None, None, :, :]
        block = tl.reshape(j0 // 4 + tl.arange(0, KEYS // 4), [KEYS // 16, 4])[None, :, :, None, None]
        kept = tl.permute(_kept(seed, rows, block, head, threshold, False), (1, 6, 2, 5, 0, 4, 3))
        kept = tl.reshape(kept, [KEYS, N])
    else:
        kept = tl.trans(survivors(seed, i, j0, head, threshold, KEYS, False))
    return kept


@triton.jit
def zero_gaps(base, stride, first, count, begin, end, cols, width, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Zeros to rows [begin, end) but [first, first + count), which other programs write."""
    r = tl.arange(0, ROWS)
    for at in range(0, end - begin - count, ROWS):
        rows = begin + at + r
        rows = tl.where(rows < first, rows, rows + count)
        zeros = tl.zeros([ROWS, cols.shape[0]], tl.float32)
        store_rows(base, stride, rows, cols, end, width, zeros, EVEN)


@triton.jit
def owned_rows(starts, b, batch, first, tokens):
    """[begin, end) of the rows that sequence b sees to: its own, the first and last also what is outside."""
    begin = tl.where(b == 0, 0, first)
    end = tl.minimum(tl.maximum(tl.load(starts + b + 1), first.to(tl.int32)), tokens)
    return begin, tl.where(b == batch - 1, tokens, end)


class Problem(NamedTuple):
    """One call's arguments as every attention kernel begins with them, and what they are cut by."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple
    flags: dict  # constexprs
    dout_strides: tuple[int, ...]  # of batch, head and row, in units
    batch: int
    heads: int
    kv_heads: int
    queries: int  # of the longest sequence, if packed
    keys: int
    dtype: torch.dtype
    width: int  # of q's and v's head dims the larger one, padded
    options: str  # what needs registers beside a plain call's: names, with spaces between

    @property
    def arguments(self) -> tuple:
        """What the kernels begin with."""
        return self.tensors + self.numbers


def readable(t: Tensor) -> Tensor:
    """t, or a copy whose last axis is contiguous: rows are read in place."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _view_of(t: Tensor | None) -> tuple | None:
    return None if t is None else (t.shape, t.stride())


def problem_of(
    q, k, v, dout, scale, offset, left, right, softcap, slopes, dropout_p, seed, mask=None, bias=None,
    lengths=None, starts_q=None, starts_k=None, longest=None,
) -> Problem:  # fmt: skip
    """What the kernels take, of [batch, heads, seq, dim], or of packed [tokens, heads, dim] and their starts.

    q, k, v, dout: readable; dout may be None. longest: (queries, keys) that no packed sequence exceeds.
    """
    views = (_view_of(q), _view_of(k), _view_of(v), _view_of(dout))
    beside = (_view_of(mask), _view_of(bias), _view_of(slopes))
    batch = q.shape[0] if starts_q is None else starts_q.shape[0] - 1
    layout = _layout(
        views, beside, q.dtype, dot_kind(q.dtype), arch_of(q.device), batch, longest, scale, offset, left,
        right, softcap, dropout_p,
    )  # fmt: skip
    seed = seed if dropout_p > 0 else None
    return Problem((q, k, v, mask, bias, lengths, starts_q, starts_k, slopes, seed), *layout)


def _band(offset: int, left: int, right: int) -> tuple[int, int, int]:
    """The same band, its ends cut where no sequence reaches: with a row added they are still int32."""
    most, offset = _UNLIMITED, max(-_UNLIMITED, min(offset, _UNLIMITED))
    if abs(offset) <= most // 2:  # as all are: the same numbers for many shapes, so the same kernels
        return offset, *(min(n, most) if n >= 0 else most for n in (left, right))
    low = max(offset - left, -most) if left >= 0 else -most
    high = min(offset + right, most) if right >= 0 else most
    return offset, min(offset - low, 2 * most - 1), min(high - offset, 2 * most - 1)


@functools.lru_cache(maxsize=1024)
def _layout(
    views, beside, dtype, kind, arch, batch, longest, scale, offset, left, right, softcap, dropout_p
) -> tuple:  # fmt: skip
    """All of a Problem but its tensors: what a model's calls have in common. views: of q, k, v and dout."""
    packed, unit = longest is not None, _unit_of(views, dtype.itemsize)
    of_heads = [tuple(n // unit for n in _head_strides(v)) for v in views]
    (shape_q, _), (shape_k, _), (shape_v, _), _ = views
    heads, kv_heads, dim, dim_v = shape_q[1], shape_k[1], shape_q[-1], shape_v[-1]
    tokens = (shape_q[0], shape_k[0]) if packed else (shape_q[2], shape_k[2])
    queries, keys = longest or tokens
    capped, (mask, bias, slopes) = softcap > 0, beside
    threshold = int(dropout_p * 2**32)
    broadcast = (*_broadcast_strides(mask, 4), *_broadcast_strides(bias, 4), *_broadcast_strides(slopes, 2))
    sizes = (heads, heads // kv_heads, batch, queries, keys, *tokens, dim // unit, dim_v // unit)
    band = _band(offset, left, right)
    factor, cap = (scale / softcap, softcap * _LOG2E) if capped else (scale * _LOG2E, None)
    dropout = (threshold - (threshold >> 31 << 32), 1.0 / (1.0 - dropout_p))  # the word's bits as an int32
    block_d, block_v = _padded(dim), _padded(dim_v)
    half = dtype != torch.float32
    flags = {
        "RAW": half and scale > 0 and not capped and slopes is None and bias is None,
        "UNIT": unit,
        "EVEN": (dim, dim_v) == (block_d, block_v),
        "PAIRS": half and not 100 <= arch < 120,  # there a thread holds rows; float32 has no tensor cores
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "BD": block_d,
        "BV": block_v,
    }
    present = {"mask": mask, "bias": bias, "alibi": slopes}
    options = [name for name, view in present.items() if view is not None]
    options += ["softcap"] * capped + ["dropout"] * (dropout_p > 0) + ["packed"] * packed
    numbers = (
        *of_heads[0],
        *of_heads[1],
        *of_heads[2],
        *broadcast,
        *sizes,
        *band,
        factor,
        cap,
        scale,
        *dropout,
    )
    cut_by = (batch, heads, kv_heads, queries, keys, dtype, max(block_d, block_v), " ".join(options))
    return numbers, flags, of_heads[3], *cut_by


def _head_strides(view: tuple | None) -> tuple[int, ...]:
    """Strides of batch, head and row of [batch, heads, seq, dim] or, packed, [tokens, heads, dim]."""
    if view is None:
        return ()
    stride = view[1]
    return stride[:3] if len(stride) == 4 else (0, stride[1], stride[0])


def _unit_of(views: tuple, itemsize: int) -> int:
    """What divides every stride and width: the elements of 16 bytes, or 1."""
    unit = 16 // itemsize
    sizes = [n for view in views if view is not None for n in (*_head_strides(view), view[0][-1])]
    return 1 if any(n % unit for n in sizes) else unit


def _broadcast_strides(view: tuple | None, axes: int) -> tuple[int, ...]:
    """Strides of a tensor, 0 where it has one entry for all."""
    if view is None:
        return (0,) * axes
    return tuple(0 if n == 1 else s for n, s in zip(*view, strict=True))


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())
