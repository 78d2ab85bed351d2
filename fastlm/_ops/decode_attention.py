"""decode_attention: the newest tokens' queries against a cache of keys and values, some of its slots unused.

As attention, causal, query i of Sq being aligned with key kv_lengths[b] - Sq + i. Sources: a cache split into
pieces whose results are merged: Dao et al., "Flash-Decoding", https://pytorch.org/blog/flash-decoding; pages:
Kwon et al., https://arxiv.org/abs/2309.06180.
"""

from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from . import _attention_check, _check, _kv_cache
from .attention import AttentionOutput
from .attention import reference as attention_reference

_LARGEST_HEAD = 512  # columns of a head that a CPU tile holds
_LARGEST_CUDA_HEAD = 256  # whose sums fit into a warp's registers
_LARGEST_FLOAT32_CUDA_HEAD = 128  # the same, beside numbers in three parts
_LARGEST_TRITON_HEAD = 256  # that a Triton tile holds


def reference(
    q, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale, scale, left, softcap, alibi_slopes
):
    """(out, lse) in plain PyTorch: attention over what the cache holds, gathered and dequantised."""
    k, v = (_gathered(t, s, block_table, q.dtype) for t, s in ((k_cache, k_scale), (v_cache, v_scale)))
    lengths = kv_lengths.clamp(0, k.shape[2])
    offset = (lengths - q.shape[2])[:, None, None, None]
    diagonal = (scale, offset, left, 0)
    out, lse = attention_reference(q, k, v, None, None, lengths, *diagonal, softcap, alibi_slopes, 0.0, None)
    return out, lse


def _gathered(cache, scale, block_table, dtype):
    """A cache as [batch, kv_heads, slots, dim] in at least float32's precision."""
    if scale is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cache = cache.to(wide) * scale.to(wide)[..., None]
    if block_table is None:
        return cache
    pages = cache[_kv_cache.page_table(cache, block_table)]  # [batch, n, kv_heads, page, dim]
    return pages.transpose(1, 2).flatten(2, 3)


def check(
    q,
    k_cache,
    v_cache,
    kv_lengths,
    block_table,
    k_scale,
    v_scale,
    scale,
    window,
    softcap,
    alibi_slopes,
    return_lse,
):
    """The forward schema's arguments; raises TypeError or ValueError."""
    op = "decode_attention"
    (q,) = _kv_cache.cast_to_cache(k_cache, q)
    _check.floating(op, "q", q)
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"{op}: q must be [batch, heads, queries, dim] with dim > 0, got {_check.got(q)}")
    capacity = _kv_cache.check(op, q, "q", k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale)
    if k_cache.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: k_cache must have q's dim {q.shape[3]}, got {k_cache.shape[3]}")
    if k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1]:
        raise ValueError(
            f"{op}: k_cache must have heads that divide q's {q.shape[1]}, got {k_cache.shape[1]}"
        )
    left = -1 if window is None else _attention_check.diagonal(op, "bottom_right", window, 0, 0)[1]
    scale, softcap = _attention_check.score_options(op, scale, q.shape[3], softcap, return_lse)
    slopes = _attention_check.slopes(op, alibi_slopes, q, *q.shape[:2])
    _kv_cache.no_gradient(op, q=q, k_cache=k_cache, v_cache=v_cache)
    if _check.has_values(kv_lengths):
        _check_lengths(op, kv_lengths.tolist(), capacity, block_table, k_cache)
    return q, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale, scale, left, softcap, slopes


def _check_lengths(op, lengths, capacity, block_table, k_cache):
    if lengths and not 0 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"{op}: kv_lengths must be in [0, {capacity}], got {lengths}")
    _kv_cache.check_pages(op, block_table, [0] * len(lengths), lengths, k_cache)


def _fake_forward(q, k_cache, v_cache, *_):
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, queries, heads, v_cache.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def _cuda_limits(q, k_cache, v_cache, *_):
    """Head dims above 256; in float32 above 128."""
    largest = max(q.shape[3], v_cache.shape[3])
    if q.dtype == torch.float32 and _LARGEST_FLOAT32_CUDA_HEAD < largest <= _LARGEST_TRITON_HEAD:
        own = f"decode_attention.cuda takes head dims up to {_LARGEST_FLOAT32_CUDA_HEAD} in float32"
        return f"{own}, got {largest}: backend='triton' takes them up to {_LARGEST_TRITON_HEAD}"
    return _too_wide("cuda", _LARGEST_CUDA_HEAD, q, v_cache)


def _cpu_limits(q, k_cache, v_cache, *_):
    """Head dims above 512."""
    return _too_wide("cpu", _LARGEST_HEAD, q, v_cache)


def _triton_limits(q, k_cache, v_cache, *_):
    """Head dims above 256."""
    return _too_wide("triton", _LARGEST_TRITON_HEAD, q, v_cache)


def _too_wide(backend, most, q, v_cache):
    largest = max(q.shape[3], v_cache.shape[3])
    return (
        f"decode_attention.{backend} takes head dims up to {most}, got {largest}" if largest > most else None
    )


OP = Op(
    "decode_attention",
    reference,
    check=check,
    forward=(
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_lengths, Tensor? block_table, Tensor? k_scale,"
        " Tensor? v_scale, float scale, SymInt left, float softcap, Tensor? alibi_slopes)"
        " -> (Tensor out, Tensor lse)",
        _fake_forward,
    ),
    backends={"cuda": _cuda_limits, "triton": _triton_limits, "cpu": _cpu_limits},
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor | AttentionOutput:
    """Attention of the newest tokens over a cache that append_kv fills: the step of generating a token.

    The queries are the last ones of the first kv_lengths[b] cached tokens of sequence b: query i is aligned
    with key kv_lengths[b] - queries + i and attends to no later one. Slots from kv_lengths[b] on are never
    read. It has no backward. A query with nothing to attend to gives out 0 and lse -inf.

    Args:
        q: [batch, heads, queries, dim], float32, float16, bfloat16 or float64; queries is small, often 1.
        k_cache: [batch, kv_heads, slots, dim], or in pages [pages, kv_heads, page, dim]; q's dtype, or int8.
            Query head h reads kv head h // (heads / kv_heads). Under autocast q is cast to a floating cache's
            dtype.
        v_cache: [batch or pages, kv_heads, slots or page, dim_v], in k_cache's dtype.
        kv_lengths: int32 [batch], how many tokens each sequence has AFTER appending the queries' own.
        block_table: int32 [batch, n] for caches in pages: token t of sequence b lies in page
            block_table[b, t // page]. Pages may be shared; entries past a length are not looked at.
        k_scale, v_scale: for int8 caches, x being int8 * scale: float32, the cache's shape without dim.
        scale: of the scores; None is dim ** -0.5.
        window: (left, right) in keys, None = unlimited: keeps the query's own key and `left` before it.
        softcap: bound of scale * q k^T, 0 = none.
        alibi_slopes: float32 [heads] or [batch, heads]: adds -slope * distance between query and key.
        return_lse: also return lse, the log-sum-exp of each row of scores.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        out [batch, heads, queries, dim_v] in q's dtype, laid out so that out.transpose(1, 2) is contiguous;
        with return_lse AttentionOutput(out, lse), lse [batch, heads, queries] float32 (float64 if q is).

    Raises:
        TypeError, ValueError: an argument is not as above; the numbers in kv_lengths and block_table are
            looked at on a CPU outside torch.compile only. NotImplementedError: `backend` refuses, or
            something requires a gradient while gradients are enabled.

    Source: https://pytorch.org/blog/flash-decoding
    """
    options = (block_table, k_scale, v_scale, scale, window, softcap, alibi_slopes, return_lse)
    if may_be_usual(backend) and (usual := OP.usual(q, k_cache, v_cache, kv_lengths, *options)) is not None:
        return AttentionOutput(*usual) if return_lse else usual
    out, lse = OP(backend, check(q, k_cache, v_cache, kv_lengths, *options))
    return AttentionOutput(out, lse) if return_lse else out
