"""What memory_bars.py counts: each op at a size of many programs, and what torch users write instead.

BESIDE: more sizes and ops, for the table that puts csrc/cuda beside Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Workload:
    """arguments: -> the public function's. eager: what torch users write instead, on the same arguments."""

    title: str
    op: str
    arguments: Callable[[], dict]
    eager: Callable[..., Tensor] | None = None
    backward: bool = True
    unread: tuple[str, ...] = ()  # what backward's schema has and needs only without dropout and residual


def _rows(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, dtype=torch.bfloat16)


def _norm(residual: bool = False) -> Callable[[], dict]:
    def arguments():
        given = {"x": _rows(8192, 256), "weight": torch.randn(256, dtype=torch.bfloat16)}
        return given | {"residual": _rows(8192, 256), "dropout_p": 0.1, "seed": 7} if residual else given

    return arguments


def _eager_norm(norm: Callable) -> Callable:
    def eager(x, weight, residual=None, dropout_p=0.0, seed=None):
        h = x if residual is None else functional.dropout(x, dropout_p) + residual
        return norm(h, (x.shape[-1],), weight)

    return eager


def _eager_rms_norm(x, shape, weight):
    """As Hugging Face's Llama writes it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _eager_rope(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _eager_decode(q, k_cache, v_cache, kv_lengths):
    """Keys and values repeated for every query head, matmul, softmax, matmul."""
    k, v = (c.repeat_interleave(4, 1) for c in (k_cache, v_cache))
    return (q @ k.transpose(2, 3) / 8).softmax(-1) @ v


def _table(seq: int, dim: int) -> Tensor:
    return torch.randn(seq, dim // 2, dtype=torch.bfloat16).repeat(1, 2)


WORKLOADS = [
    Workload("softmax [2048, 512]", "softmax", lambda: {"x": _rows(2048, 512)}, lambda x: x.softmax(-1)),
    Workload("layer_norm [8192, 256]", "layer_norm", _norm(), _eager_norm(functional.layer_norm)),
    Workload(
        "dropout + residual + layer_norm",
        "layer_norm",
        _norm(True),
        _eager_norm(functional.layer_norm),
        unread=("x",),
    ),
    Workload("rms_norm [8192, 256]", "rms_norm", _norm(), _eager_norm(_eager_rms_norm)),
    Workload(
        "dropout_add [2048, 512]",
        "dropout_add",
        lambda: {"x": _rows(2048, 512), "residual": _rows(2048, 512), "dropout_p": 0.1, "seed": 7},
        lambda x, residual, dropout_p, seed: functional.dropout(x, dropout_p) + residual,
    ),
    Workload(
        "bias + gelu_tanh [16384, 128]",
        "bias_act",
        lambda: {
            "x": _rows(16384, 128),
            "bias": torch.randn(128, dtype=torch.bfloat16),
            "activation": "gelu_tanh",
        },
        lambda x, bias, activation: functional.gelu(x + bias, approximate="tanh"),
    ),
    Workload(
        "glu, silu [2048, 512]",
        "glu",
        lambda: {"gate": _rows(2048, 512), "up": _rows(2048, 512)},
        lambda gate, up: functional.silu(gate) * up,
    ),
    Workload(
        "rope [2, 32, 128, 64]",
        "rope",
        lambda: {
            "x": torch.randn(2, 32, 128, 64, dtype=torch.bfloat16),
            "cos": _table(128, 64),
            "sin": _table(128, 64),
        },
        _eager_rope,
    ),
    Workload(
        "cross_entropy [64, 16384]",
        "cross_entropy",
        lambda: {"logits": _rows(64, 16384), "target": torch.randint(0, 16384, (64,))},
        lambda logits, target: functional.cross_entropy(logits.float(), target),
    ),
    Workload(
        "append_kv [4, 8, 64, 64]",
        "append_kv",
        lambda: {
            "k": torch.randn(4, 8, 64, 64, dtype=torch.bfloat16),
            "v": torch.randn(4, 8, 64, 64, dtype=torch.bfloat16),
            "k_cache": torch.zeros(4, 8, 64, 64, dtype=torch.bfloat16),
            "v_cache": torch.zeros(4, 8, 64, 64, dtype=torch.bfloat16),
            "kv_lengths": torch.zeros(4, dtype=torch.int32),
        },
        lambda k, v, k_cache, v_cache, kv_lengths: k_cache.copy_(k) + v_cache.copy_(v),
        backward=False,
    ),
    Workload(
        "decode_attention [4, 8, 1, 64] over 4096",
        "decode_attention",
        lambda: {
            "q": torch.randn(4, 8, 1, 64, dtype=torch.bfloat16),
            "k_cache": torch.randn(4, 2, 4096, 64, dtype=torch.bfloat16),
            "v_cache": torch.randn(4, 2, 4096, 64, dtype=torch.bfloat16),
            "kv_lengths": torch.full((4,), 4096, dtype=torch.int32),
        },
        _eager_decode,
        backward=False,
    ),
]


def _wide_norm(rows: int, cols: int) -> Callable[[], dict]:
    return lambda: {"x": _rows(rows, cols), "weight": torch.randn(cols, dtype=torch.bfloat16)}


def _attention(heads: int, dim: int) -> Callable[[], dict]:
    def arguments():
        made = {n: torch.randn(1, heads, 512, dim, dtype=torch.bfloat16) for n in "qkv"}
        return made | {"causal": True}

    return arguments


def _packed() -> dict:
    made = {n: torch.randn(768, 4, 64, dtype=torch.bfloat16) for n in "qkv"}
    starts = torch.tensor([0, 256, 768], dtype=torch.int32)
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_q": 512, "max_k": 512}
    return made | lengths | {"causal": True}


def _int8_decode() -> dict:
    caches = {
        n: torch.randint(-127, 128, (4, 2, 2048, 128), dtype=torch.int8) for n in ("k_cache", "v_cache")
    }
    scales = {n: torch.rand(4, 2, 2048) / 127 for n in ("k_scale", "v_scale")}
    lengths = torch.full((4,), 2048, dtype=torch.int32)
    q = torch.randn(4, 8, 1, 128, dtype=torch.bfloat16)
    return {"q": q, **caches, "kv_lengths": lengths, **scales}


def _feed_forward() -> dict:
    x, w1, w2 = _rows(256, 128), _rows(512, 128), _rows(128, 512)
    b1, b2 = torch.randn(512, dtype=torch.bfloat16), torch.randn(128, dtype=torch.bfloat16)
    return {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}


BESIDE = [
    Workload("softmax [16, 50304]", "softmax", lambda: {"x": _rows(16, 50304)}),
    Workload("layer_norm [256, 4096]", "layer_norm", _wide_norm(256, 4096)),
    Workload("rms_norm [256, 4096]", "rms_norm", _wide_norm(256, 4096)),
    Workload("rms_norm [128, 16384]", "rms_norm", _wide_norm(128, 16384)),
    Workload("attention causal [1, 4, 512, 64]", "attention", _attention(4, 64)),
    Workload("attention causal [1, 2, 512, 128]", "attention", _attention(2, 128)),
    Workload("attention_varlen causal [256 + 512, 4, 64]", "attention_varlen", _packed),
    Workload(
        "decode_attention [4, 8, 1, 128] over 2048, int8", "decode_attention", _int8_decode, None, False
    ),
    Workload("feed_forward [256, 128 x 512]", "feed_forward", _feed_forward),
    Workload(
        "linear_cross_entropy [64, 64 x 16384]",
        "linear_cross_entropy",
        lambda: {"x": _rows(64, 64), "weight": _rows(16384, 64), "target": torch.randint(0, 16384, (64,))},
    ),
]
