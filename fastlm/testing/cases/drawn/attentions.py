"""Drawn cases of the attentions and of their cache."""

import torch
from torch import Tensor

from .. import Draw
from ..decode_attention import paged, with_int8
from ..tiled_heads import WIDTHS
from .pick import Pick

_SIZES = (1, 1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 41, 48, 63, 64, 65, 70, 96, 100, 127, 128, 129, 150)
_HEADS = (1, 3, 8, 16, 20, 24, 32, 40, 48, 64, 65, 72, 80, 96, 100, 128, 160, 192, 256)


def _heads(pick: Pick) -> tuple[int, int, int, int]:
    """(heads, kv_heads, dim, dim_v); two of three are of the widths that csrc/cuda has tiles of."""
    kv_heads = pick.choice((1, 1, 2, 3))
    heads = kv_heads * pick.choice((1, 1, 2, 4))
    dim = pick.choice(WIDTHS[:4]) if pick.often(0.6) else pick.choice(_HEADS)
    return heads, kv_heads, dim, pick.choice(_HEADS) if pick.often(0.15) else dim


def _scores(pick: Pick, d: Draw, batch: int, heads: int) -> dict:
    """Options of all three attentions."""
    made = {"window": (pick.choice((None, 3, 20, 70)), pick.choice((None, 2, 33)))}
    made = made if pick.often(0.35) else {}
    if pick.often(0.25):
        made["softcap"] = pick.choice((1.0, 5.0, 30.0))
    if pick.often(0.25):
        shape = (heads,) if pick.often(0.5) else (batch, heads)
        made["alibi_slopes"] = d.normal(*shape, scale=0.2, dtype=torch.float32)
    if pick.often(0.3):
        made["scale"] = pick.choice((0.05, 0.3, -0.2))
    return made | {"return_lse": pick.often(0.5)}


def attention(pick: Pick, d: Draw) -> dict:
    """Any of its options at once."""
    batch, (heads, kv_heads, dim, dim_v) = pick.choice((1, 1, 2)), _heads(pick)
    queries, keys = pick.choice(_SIZES), pick.choice(_SIZES[4:])
    queries = keys if pick.often(0.3) else queries
    made = {
        "q": pick.layout(d, batch, heads, queries, dim, tokens=2),
        "k": pick.layout(d, batch, kv_heads, keys, dim, tokens=2),
    }
    made |= {"v": pick.layout(d, batch, kv_heads, keys, dim_v, tokens=2)} | _scores(pick, d, batch, heads)
    causal = pick.choice((False, False, "top_left", "bottom_right", queries == keys))
    made |= {"causal": causal} | pick.dropout()
    full = (batch, heads, queries, keys)
    if pick.often(0.25):
        made["mask"] = pick.mask(d, full)
    if pick.often(0.3):
        shape = [*(1 if pick.often(0.3) else n for n in full[:3]), keys]
        made["bias"] = pick.layout(d, *shape, dtype=pick.choice((d.dtype, torch.float32)))
        if pick.often(0.4):
            hidden = d.booleans(*shape, p=0.2)
            made["bias"] = made["bias"].masked_fill(hidden, float("-inf"))
    if pick.often(0.3):
        lengths = [pick.choice((0, keys // 2, keys)) for _ in range(batch)]
        made["kv_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    return made


def _lengths(pick: Pick, sequences: int) -> list[int]:
    return [pick.choice((0, *_SIZES[4:])) for _ in range(sequences)]


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=torch.int32)


def attention_varlen(pick: Pick, d: Draw) -> dict:
    """Up to three sequences, some of them empty."""
    sequences, (heads, kv_heads, dim, dim_v) = pick.choice((1, 2, 3)), _heads(pick)
    q_lengths, k_lengths = _lengths(pick, sequences), _lengths(pick, sequences)
    alike = pick.often(0.4)
    k_lengths = q_lengths if alike else k_lengths
    made = {
        "q": pick.layout(d, sum(q_lengths), heads, dim, tokens=0),
        "k": pick.layout(d, sum(k_lengths), kv_heads, dim, tokens=0),
    }
    made |= {"v": pick.layout(d, sum(k_lengths), kv_heads, dim_v, tokens=0)} | _scores(
        pick, d, sequences, heads
    )
    starts = _starts(q_lengths)
    made |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts if alike else _starts(k_lengths)}
    spare = pick.choice((0, 0, 7, 100))  # maxima may be more than the longest
    made |= {"max_q": max(q_lengths) + spare, "max_k": max(k_lengths) + spare}
    return made | {"causal": pick.choice((False, False, "top_left", "bottom_right", alike))} | pick.dropout()


def _cache(pick: Pick, d: Draw, inputs: dict, dim: int, dim_v: int, kv_heads: int, slots: int) -> dict:
    """Caches, perhaps of int8, perhaps in pages."""
    batch = inputs["kv_lengths"].shape[0]
    inputs = inputs | {"k_cache": d.normal(batch, kv_heads, slots, dim)}
    inputs |= {"v_cache": d.normal(batch, kv_heads, slots, dim_v)}
    if pick.often(0.3):
        inputs = with_int8(d, inputs)
    if pick.often(0.4):
        return paged(d, inputs, pick.choice((1, 3, 16, 32, 50)))
    if "k_scale" not in inputs and pick.often(0.5):
        k = d.normal(batch, slots, kv_heads, dim).transpose(1, 2)
        inputs |= {"k_cache": k, "v_cache": d.slice_of((batch, kv_heads, slots, dim_v + 9), 8, dim_v)}
    return inputs


def decode_attention(pick: Pick, d: Draw) -> dict:
    """A cache of any kind, lengths from none to all of it."""
    batch, (heads, kv_heads, dim, dim_v) = pick.choice((1, 2, 4)), _heads(pick)
    queries, slots = pick.choice((1, 1, 1, 2, 5)), pick.choice((*_SIZES, 300, 700))
    lengths = [pick.choice((0, 1, slots // 2, slots)) for _ in range(batch)]
    made = {"kv_lengths": torch.tensor(lengths, dtype=torch.int32)}
    made |= {"q": pick.layout(d, batch, heads, queries, dim)} | _scores(pick, d, batch, heads)
    return _cache(pick, d, made, dim, dim_v, kv_heads, slots)


def append_kv(pick: Pick, d: Draw) -> dict:
    """Tokens behind what a cache of any kind holds."""
    batch, (_, kv_heads, dim, dim_v) = pick.choice((1, 2, 4)), _heads(pick)
    slots = pick.choice(_SIZES)
    tokens = min(pick.choice((0, 1, 1, 2, 5, 40)), slots)
    lengths = [pick.choice((0, (slots - tokens) // 2, slots - tokens)) for _ in range(batch)]
    made = {
        "k": pick.layout(d, batch, kv_heads, tokens, dim),
        "v": pick.layout(d, batch, kv_heads, tokens, dim_v),
    }
    made |= {"kv_lengths": torch.tensor(lengths, dtype=torch.int32)}
    return _cache(pick, d, made, dim, dim_v, kv_heads, slots)
