"""append_kv: writes the keys and values of new tokens into a cache, behind those that it holds.

Token s of sequence b goes to slot kv_lengths[b] + s. In pages: Kwon et al., "Efficient memory management for
large language model serving with PagedAttention", https://arxiv.org/abs/2309.06180. An int8 cache keeps x
as q = rint(x / scale), half to even, with scale = max|x| / 127 of each token and head.
"""

from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from . import _check, _kv_cache

_LARGEST_TRITON_HEAD = 4096  # a row in the registers of a block


def reference(k, v, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale):
    """Writes in plain PyTorch, through a copy of the cache; tokens that have no slot are dropped."""
    slot = _slots(k, k_cache, kv_lengths, block_table)
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is not None:
            x, own = quantised(x, scale.dtype)
            _write(own[..., None], scale[..., None], slot)
        _write(x, cache, slot)


def quantised(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., dim] as (int8 [..., dim], scale [...]); where x holds NaN or infinity so does scale."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    largest = x.abs().amax(-1)
    scale = (largest / largest.new_full((), 127)).to(scale_dtype)  # by a number a GPU multiplies with 1 / 127
    usable = (scale > 0) & scale.isfinite()
    q = (x / torch.where(usable, scale, 1.0)[..., None]).round()
    return torch.where(usable[..., None], q, 0.0).to(torch.int8), scale


def _slots(k, cache, kv_lengths, block_table):
    """Where each token goes, [batch, tokens], slots numbered through all pages; past them if nowhere."""
    pages, _, page, _ = cache.shape
    table = _kv_cache.page_table(cache, block_table)
    position = kv_lengths.long()[:, None] + torch.arange(k.shape[2], device=k.device)
    inside = (position >= 0) & (position < table.shape[1] * page)
    entry = torch.where(inside, position // max(1, page), 0)
    if block_table is not None:
        named = block_table.long().gather(1, entry) if table.shape[1] else entry
        inside = inside & (named >= 0) & (named < pages)
    chosen = table.gather(1, entry) if table.shape[1] else entry
    return torch.where(inside, chosen * page + position % max(1, page), pages * page)


def _write(x, cache, slot):
    """x [batch, heads, tokens, dim] into cache [pages, heads, page, dim]."""
    pages, heads, page, dim = cache.shape
    flat = cache.transpose(1, 2).reshape(pages * page, heads, dim)
    flat = torch.cat([flat, flat.new_empty(1, heads, dim)])  # what is dropped goes to the last row
    flat = flat.index_put((slot.flatten(),), x.transpose(1, 2).reshape(-1, heads, dim).to(cache.dtype))
    cache.copy_(flat[:-1].view(pages, page, heads, dim).transpose(1, 2))


def check(k, v, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale):
    """The forward schema's arguments; raises TypeError or ValueError."""
    op = "append_kv"
    k, v = _kv_cache.cast_to_cache(k_cache, k, v)
    for name, t in (("k", k), ("v", v)):
        _check.floating(op, name, t)
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must be [batch, kv_heads, tokens, dim], got {_check.got(t)}")
    if v.dtype != k.dtype or v.device != k.device:
        raise TypeError(f"{op}: v must be {k.dtype} on {k.device} as k, got {_check.got(v)}")
    capacity = _kv_cache.check(op, k, "k", k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale)
    for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = (k.shape[0], cache.shape[1], k.shape[2], cache.shape[3])
        if t.shape != wanted:
            raise ValueError(f"{op}: {name} must have shape {wanted} for {name}_cache, got {tuple(t.shape)}")
    _kv_cache.no_gradient(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    if _check.has_values(kv_lengths):
        _check_room(op, kv_lengths.tolist(), k.shape[2], capacity, block_table, k_cache)
    return k, v, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale


def _check_room(op, lengths, tokens, capacity, block_table, k_cache):
    if lengths and not 0 <= min(lengths) <= max(lengths) <= capacity - tokens:
        room = f"leave room for {tokens} more in {capacity} slots"
        raise ValueError(
            f"{op}: kv_lengths, before appending, must not be negative and {room}, got {lengths}"
        )
    _kv_cache.check_pages(op, block_table, lengths, [n + tokens for n in lengths], k_cache)


def _fake_forward(*_):
    return None


def _cuda_limits(k, v, k_cache, v_cache, *_):
    """Caches whose last dimension is not contiguous."""
    return _scattered("cuda", k_cache, v_cache)


def _cpu_limits(k, v, k_cache, v_cache, *_):
    """Caches whose last dimension is not contiguous."""
    return _scattered("cpu", k_cache, v_cache)


def _triton_limits(k, v, k_cache, v_cache, *_):
    """Caches whose last dimension is not contiguous; head dims above 4096."""
    largest = max(k_cache.shape[3], v_cache.shape[3])
    if largest > _LARGEST_TRITON_HEAD:
        return f"append_kv.triton takes head dims up to {_LARGEST_TRITON_HEAD}, got {largest}"
    return _scattered("triton", k_cache, v_cache)


def _scattered(backend, k_cache, v_cache):
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1 and cache.shape[3] != 1:
            got = f"{name} has stride {cache.stride(3)}"
            return f"append_kv.{backend} takes caches whose last dimension is contiguous, {got}"
    return None


OP = Op(
    "append_kv",
    reference,
    check=check,
    forward=(
        "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_lengths, Tensor? block_table,"
        " Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()",
        _fake_forward,
    ),
    backends={"cuda": _cuda_limits, "triton": _triton_limits, "cpu": _cpu_limits},
)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> None:
    """Writes new tokens' keys and values into a cache, in place: token s of sequence b at kv_lengths[b] + s.

    It has no backward. It does not change kv_lengths: add the number of tokens before decode_attention, which
    takes the lengths after appending. An int8 cache keeps x as rint(x / scale), half to even, in
    [-127, 127], scale = max|x| / 127 of each token and head; a token that is 0 has scale 0.

    Args:
        k: [batch, kv_heads, tokens, dim], float32, float16, bfloat16 or float64.
        v: [batch, kv_heads, tokens, dim_v], like k. Under autocast both are cast to a floating cache's dtype.
        k_cache: [batch, kv_heads, slots, dim], or in pages [pages, kv_heads, page, dim]; k's dtype, or int8.
        v_cache: [batch or pages, kv_heads, slots or page, dim_v], in k_cache's dtype.
        kv_lengths: int32 [batch], how many tokens each sequence has BEFORE appending.
        block_table: int32 [batch, n] for caches in pages: token t of sequence b lies in page
            block_table[b, t // page]. A page that is written must belong to one sequence alone.
        k_scale, v_scale: for int8 caches, and written too: float32, the cache's shape without dim.
        backend: None chooses; a named backend runs it or raises.

    Raises:
        TypeError, ValueError: an argument is not as above; on a CPU outside torch.compile also where a token
            has no slot or block_table names no page: elsewhere such a token is dropped. NotImplementedError:
            `backend` refuses, or something requires a gradient while gradients are enabled.

    Source: https://arxiv.org/abs/2309.06180
    """
    arguments = (k, v, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale)
    if may_be_usual(backend) and OP.usual(*arguments):
        return
    OP(backend, check(*arguments))
