"""Workloads that multiply matrices: attention, feed-forward, linear cross-entropy; and those of the cache.

FLOPs are those of the matmuls, two per multiply-add. Attention's backward has 2.5 times the forward's: scores
again, and four gradients.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..testing.cases.attention import qkv
from ..testing.cases.feed_forward import layer
from .workload import Baseline, Work, Workload, bytes_of

_BACKWARD = 2.5


def _attention_work(pairs: Callable[[dict], float]) -> Callable[[dict, str], Work]:
    """pairs: arguments -> how many scores (query, key, head) are needed."""

    def work(arguments: dict, direction: str) -> Work:
        dims = arguments["q"].shape[-1] + arguments["v"].shape[-1]
        passes = 1 if direction == "forward" else 1 + _BACKWARD
        moved = sum(bytes_of(arguments[n]) for n in "qqkv")  # q once more: the output
        return Work(moved if direction == "forward" else 3 * moved, 2 * dims * pairs(arguments) * passes)

    return work


def _products(arguments: dict, names: tuple[str, ...], flops: float, direction: str) -> Work:
    """Matmuls whose tensors move once forward and twice backward; backward has two matmuls for each."""
    passes = 1 if direction == "forward" else 3
    return Work(passes * sum(bytes_of(arguments[n]) for n in names), passes * flops)


def _causal_pairs(arguments: dict) -> float:
    batch, heads, seq, _ = arguments["q"].shape
    return batch * heads * seq * (seq + 1) / 2


def _length_pairs(arguments: dict) -> float:
    _, heads, queries, _ = arguments["q"].shape
    return heads * queries * arguments["kv_lengths"].sum().item()


def _packed_pairs(arguments: dict) -> float:
    return arguments["q"].shape[1] * arguments["cu_seqlens_q"].diff().double().square().sum().item()


def _sdpa(q, k, v, causal=False, dropout_p=0.0, mask=None):
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=causal)


def _half_lengths(d, batch, heads, seq, dim):
    return qkv(d, batch, heads, seq, seq, dim) | {"kv_lengths": torch.full((batch,), seq // 2).int()}


def _padding_mask(arguments: dict) -> dict:
    """What a user of SDPA passes for kv_lengths: a mask of the keys that exist."""
    given = dict(arguments)
    keys = torch.arange(given["k"].shape[2], device=given["k"].device)
    return given | {"mask": keys < given.pop("kv_lengths")[:, None, None, None]}


def _sequences(d, count, shortest, longest, heads, dim):
    """`count` sequences, their lengths evenly spread from shortest to longest, packed in a random order."""
    lengths = torch.linspace(shortest, longest, count).round().int()
    lengths = lengths[d.normal(count, dtype=torch.float32).argsort()]
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    tokens, most = int(starts[-1]), int(lengths.max())
    made = {n: d.normal(tokens, heads, dim) for n in "qkv"}
    return made | {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_q": most, "max_k": most}


def _valid(arguments: dict) -> Tensor:
    lengths = arguments["cu_seqlens_q"].diff()
    return torch.arange(arguments["max_q"], device=lengths.device) < lengths[:, None]


def _pad(arguments: dict, packed: Tensor) -> Tensor:
    """[tokens, heads, dim] -> [sequences, heads, longest, dim], zeros after each sequence."""
    valid = _valid(arguments)
    padded = packed.new_zeros(*valid.shape, *packed.shape[1:])
    padded[valid] = packed.detach()
    return padded.transpose(1, 2).contiguous()


def _unpad(arguments: dict, padded: Tensor) -> Tensor:
    return padded.transpose(1, 2)[_valid(arguments)]


def _padded(arguments: dict) -> dict:
    made = {n: _pad(arguments, arguments[n]) for n in "qkv"}
    return made | {"mask": _valid(arguments)[:, None, None, :]}


def _cached(d, batch, heads, keys, dim):
    caches = {n: d.normal(batch, heads, keys, dim) for n in ("k_cache", "v_cache")}
    return {"q": d.normal(batch, heads, 1, dim), **caches, "kv_lengths": torch.full((batch,), keys).int()}


def _cache_sdpa(q, k_cache, v_cache, kv_lengths):
    return F.scaled_dot_product_attention(q, k_cache, v_cache)  # all caches are full: no mask is needed


def _cache_work(arguments: dict, direction: str) -> Work:
    return Work(sum(bytes_of(arguments[n]) for n in ("k_cache", "v_cache")), bound="read")


def _newest(d, batch, heads, keys, dim):
    """One new token for each sequence of `keys` cached ones, and room for it."""
    new = {n: d.normal(batch, heads, 1, dim) for n in "kv"}
    caches = {n: torch.zeros(batch, heads, keys + 1, dim, dtype=d.dtype) for n in ("k_cache", "v_cache")}
    return new | caches | {"kv_lengths": torch.full((batch,), keys).int()}


def _append(k, v, k_cache, v_cache, kv_lengths):
    sequences = torch.arange(len(kv_lengths), device=k.device)
    k_cache[sequences, :, kv_lengths] = k[:, :, 0]
    v_cache[sequences, :, kv_lengths] = v[:, :, 0]
    return v_cache


def _feed_forward(x, w1, b1, w2, b2, dropout_p):
    return F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), dropout_p), w2, b2)


def _feed_forward_inputs(d, rows, cols, hidden):
    return {"x": d.normal(rows, cols)} | layer(d, cols, hidden, cols)


def _feed_forward_work(arguments: dict, direction: str) -> Work:
    matmul = 2 * arguments["x"].numel() * arguments["w1"].shape[0]
    return _products(arguments, ("x", "w1", "w2", "x"), 2 * matmul, direction)


def _head(d, rows, cols, classes):
    weight = d.normal(classes, cols, scale=cols**-0.5)
    return {"x": d.normal(rows, cols), "weight": weight, "target": d.integers(0, classes, rows)}


def _head_cross_entropy(x, weight, target):
    return F.cross_entropy(F.linear(x, weight), target)


def _head_work(arguments: dict, direction: str) -> Work:
    matmul = 2 * arguments["x"].numel() * arguments["weight"].shape[0]
    return _products(arguments, ("x", "weight"), matmul, direction)


def _causal(name: str, size: tuple, gpu: tuple, directions=("both",), dropout_p: float = 0.0) -> Workload:
    return Workload(
        "attention",
        name,
        lambda d, batch, heads, seq, dim: qkv(d, batch, heads, seq, seq, dim),
        size,
        (2, 3, 40, 16),
        {"sdpa": Baseline(_sdpa)},
        _attention_work(_causal_pairs),
        directions=directions,
        options={"causal": True, "dropout_p": dropout_p},
        gpu=gpu,
    )


WORKLOADS = [
    _causal("gpt2_causal", (4, 12, 1024, 64), (8, 16, 2048, 64), ("forward", "both")),
    _causal("long_causal", (1, 16, 2048, 128), (1, 32, 8192, 128), ("forward", "both")),
    _causal("causal_dropout", (4, 12, 512, 64), (8, 16, 2048, 64), dropout_p=0.1),
    Workload(
        "attention",
        "half_lengths",
        _half_lengths,
        (16, 12, 256, 64),
        (3, 2, 20, 16),
        {"sdpa": Baseline(_sdpa, _padding_mask)},
        _attention_work(_length_pairs),
        gpu=(16, 16, 2048, 64),
    ),
    Workload(
        "attention_varlen",
        "16_to_256_tokens",
        _sequences,
        (32, 16, 256, 12, 64),
        (4, 3, 30, 2, 16),
        {"sdpa": Baseline(_sdpa, _padded, _pad, _unpad)},
        _attention_work(_packed_pairs),
        gpu=(64, 128, 2048, 16, 64),
    ),
    Workload(
        "decode_attention",
        "cached",
        _cached,
        (8, 12, 1024, 64),
        (2, 3, 50, 16),
        {"sdpa": Baseline(_cache_sdpa)},
        _cache_work,
        directions=("forward",),
        sets=4,  # 200 MB of caches in turn: no last-level cache holds them
        gpu=(8, 32, 4096, 128),
    ),
    Workload(
        "append_kv",
        "one_token",
        _newest,
        (8, 12, 1024, 64),
        (2, 3, 50, 16),
        {"eager": Baseline(_append)},
        lambda arguments, direction: None,  # 50 KB: too small for a bandwidth to be its floor
        pick=lambda output, arguments: arguments["v_cache"],
        directions=("forward",),
        gpu=(8, 32, 4096, 128),
    ),
    *(
        Workload(
            "feed_forward",
            name,
            _feed_forward_inputs,
            (1024, 768, 3072),
            (17, 24, 40),
            {"eager": Baseline(_feed_forward)},
            _feed_forward_work,
            options={"dropout_p": p},
            gpu=(4096, 4096, 11008),
        )
        for name, p in (("gpt2", 0.0), ("gpt2_dropout", 0.1))
    ),
    Workload(
        "linear_cross_entropy",
        "gpt2",
        _head,
        (1024, 768, 50257),
        (17, 24, 101),
        {"eager": Baseline(_head_cross_entropy)},
        _head_work,
        peak=True,
        gpu=(4096, 4096, 128256),
    ),
]
