"""What memory_bars.py counts: each op at a size of many programs, and what torch users write instead."""

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
    eager: Callable[..., Tensor]
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
        "rope [2, 8, 512, 64]",
        "rope",
        lambda: {
            "x": torch.randn(2, 8, 512, 64, dtype=torch.bfloat16),
            "cos": _table(512, 64),
            "sin": _table(512, 64),
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
