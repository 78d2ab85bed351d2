"""What decode_attention and append_kv share: how a cache is laid out, and words for one that is not.

A cache holds the keys or the values of every token so far: [batch, kv_heads, slots, dim], or in pages,
[pages, kv_heads, page, dim], where block_table [batch, n] names the pages of each sequence in their order. A
cache that is not paged is one of `batch` pages of `slots` tokens, sequence b having page b.
"""

import torch
from torch import Tensor

from .._op import autocast_is_on
from . import _check


def check(op: str, x: Tensor, name: str, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale) -> int:
    """How many tokens a sequence has room for; raises TypeError or ValueError. x [batch, ...] is `name`."""
    _check_caches(op, x, name, k_cache, v_cache)
    _integers(op, "kv_lengths", kv_lengths, (x.shape[0],), x)
    if block_table is None:
        if k_cache.shape[0] != x.shape[0]:
            got = f"{k_cache.shape[0]} and no block_table"
            raise ValueError(f"{op}: k_cache must have {name}'s batch {x.shape[0]}, got {got}")
    else:
        _integers(op, "block_table", block_table, (x.shape[0], "n"), x)
        if k_cache.shape[0] == 0 or k_cache.shape[2] == 0:
            raise ValueError(
                f"{op}: k_cache must have a page of at least one token, got {_check.got(k_cache)}"
            )
    _check_scale(op, x, name, "k_scale", k_scale, k_cache)
    _check_scale(op, x, name, "v_scale", v_scale, k_cache)
    return k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])


def _check_caches(op: str, x: Tensor, name: str, k_cache, v_cache) -> None:
    for argument, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {argument} must be a tensor, got {type(t).__name__}")
        if t.dtype != x.dtype and t.dtype != torch.int8:
            raise TypeError(f"{op}: {argument} must be {x.dtype} as {name}, or int8, got {t.dtype}")
        if t.layout is not torch.strided or t.is_nested:
            kind = "nested" if t.is_nested else t.layout
            raise TypeError(f"{op}: {argument} must be a dense tensor, got a {kind} one")
        if t.dim() != 4 or t.shape[3] == 0 or t.device != x.device:
            wanted = "[batch or pages, kv_heads, slots, dim] with dim > 0"
            raise ValueError(f"{op}: {argument} must be {wanted} on {x.device}, got {_check.got(t)}")
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"{op}: v_cache must be {k_cache.dtype} as k_cache, got {v_cache.dtype}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        wanted = f"k_cache's {tuple(k_cache.shape[:3])} before its dim"
        raise ValueError(f"{op}: v_cache must have {wanted}, got {tuple(v_cache.shape)}")


def _integers(op: str, name: str, t, shape: tuple, x: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.int32:
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{op}: {name} must be an int32 tensor, got {kind}")
    if t.dim() != len(shape) or t.shape[0] != shape[0] or t.device != x.device:
        words = ", ".join(map(str, shape))
        raise ValueError(f"{op}: {name} must have shape [{words}] on {x.device}, got {_check.got(t)}")


def _check_scale(op: str, x: Tensor, x_name: str, name: str, scale, cache: Tensor) -> None:
    """A scale must be given beside an int8 cache, and only there: float32, or float64 beside a float64 x."""
    if cache.dtype != torch.int8:
        if scale is not None:
            raise ValueError(
                f"{op}: {name} must be None where the caches are not int8, got {_check.got(scale)}"
            )
        return
    if not isinstance(scale, Tensor):
        kind = "None" if scale is None else type(scale).__name__
        raise TypeError(f"{op}: {name} must be a tensor where the caches are int8, got {kind}")
    if scale.dtype != torch.float32 and not scale.dtype == x.dtype == torch.float64:
        raise TypeError(f"{op}: {name} must be float32, got {scale.dtype}")
    if scale.shape != cache.shape[:3] or scale.device != x.device:
        wanted = f"shape {tuple(cache.shape[:3])} on {x.device}, one per token and kv head"
        raise ValueError(f"{op}: {name} must have {wanted}, got {_check.got(scale)}")


def check_pages(op: str, block_table, first: list[int], end: list[int], k_cache: Tensor) -> None:
    """The pages that hold tokens [first[b], end[b]) must exist; other entries are not looked at."""
    if block_table is None:
        return
    pages, page = k_cache.shape[:3:2]
    for b, row in enumerate(block_table.tolist()):
        used = row[first[b] // page : -(-end[b] // page)] if first[b] < end[b] else []
        if used and not 0 <= min(used) <= max(used) < pages:
            raise ValueError(
                f"{op}: block_table must name pages in [0, {pages}), got {used} for sequence {b}"
            )


def no_gradient(op: str, **tensors: Tensor | None) -> None:
    """Nothing may ask for a gradient: there is no backward, and to leave it out in silence would be wrong."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            fix = "call it under torch.no_grad() or torch.inference_mode(), or train through attention"
            raise NotImplementedError(
                f"{op}: {name} must not require a gradient, there is no backward; {fix}"
            )


def cast_to_cache(cache, *tensors):
    """The tensors in a floating cache's dtype under autocast: to cast the cache would copy all of it."""
    device = cache.device.type if isinstance(cache, Tensor) else "cpu"
    if not autocast_is_on(device):
        return tensors
    if not isinstance(cache, Tensor) or not cache.is_floating_point():
        return tensors
    return tuple(t.to(cache.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors)


def page_table(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """The pages of each sequence, [batch, n] int64; one that does not exist becomes page 0."""
    if block_table is None:
        return torch.arange(cache.shape[0], device=cache.device)[:, None]
    exists = (block_table >= 0) & (block_table < cache.shape[0])
    return torch.where(exists, block_table, 0).long()
