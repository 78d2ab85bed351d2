"""Workloads that move memory: norms, activations, softmax, dropout, rope, cross-entropy.

The floor counts large tensors of x's size, each read or written once per pass; weights and row statistics
are left out. FLOPs are the formula's operations per element, exp and tanh counted as one: they are for the
roofline, and never what bounds these ops. Pairs of figures are (forward, backward).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..testing.cases.bias_act import biased
from ..testing.cases.cross_entropy import scores
from ..testing.cases.layer_norm import affine
from .workload import Baseline, Work, Workload, bytes_of

BOTH_DTYPES = ("f32", "bf16")


def tensors(
    name: str, moved: tuple[float, float], operations: tuple[float, float]
) -> Callable[[dict, str], Work]:
    """The work of moving `moved` tensors like argument `name`, with `operations` for each of its elements."""

    def work(arguments: dict, direction: str) -> Work:
        passes = 1 if direction == "forward" else 2
        like = arguments[name]
        return Work(sum(moved[:passes]) * bytes_of(like), sum(operations[:passes]) * like.numel())

    return work


def _layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _dropout_layer_norm(x, weight, bias, residual, dropout_p):
    return F.layer_norm(F.dropout(x, dropout_p) + residual, x.shape[-1:], weight, bias)


def _rms_norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _dropout_add(x, residual, dropout_p):
    return F.dropout(x, dropout_p) + residual


def _gelu_tanh(x, bias, activation):
    return F.gelu(x + bias, approximate="tanh")


def _causal_softmax(x, scale, causal):
    excluded = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return F.softmax((x * scale).masked_fill(excluded, float("-inf")), -1)


def _rope(x, cos, sin):
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def _swiglu(gate, up):
    return F.silu(gate) * up


def _cross_entropy(logits, target):
    return F.cross_entropy(logits, target)


def _eager(call: Callable) -> dict[str, Baseline]:
    return {"eager": Baseline(call)}


def _with_residual(d, rows, cols):
    return affine(d, rows, cols) | {"residual": d.normal(rows, cols)}


def _weighted(d, rows, cols):
    return {"x": d.normal(rows, cols), "weight": d.normal(cols) + 1}


def _rotated(d, batch, heads, seq, dim):
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angle = (torch.arange(seq)[:, None] * frequency).repeat(1, 2)
    return {
        "x": d.normal(batch, heads, seq, dim),
        "cos": angle.cos().to(d.dtype),
        "sin": angle.sin().to(d.dtype),
    }


def _gated(d, rows, cols):
    return {"gate": d.normal(rows, cols), "up": d.normal(rows, cols)}


def _nothing(arguments: dict, direction: str) -> None:
    """Too small for a bandwidth to be its floor."""


WORKLOADS = [
    Workload(
        "layer_norm",
        "gpt2",
        affine,
        (4096, 768),
        (17, 96),
        _eager(_layer_norm),
        tensors("x", (2, 3), (8, 14)),
        dtypes=BOTH_DTYPES,
        gpu=(16384, 4096),
    ),
    Workload(
        "layer_norm",
        "dropout_residual",
        _with_residual,
        (4096, 768),
        (17, 96),
        _eager(_dropout_layer_norm),
        tensors("x", (4, 4), (11, 16)),  # x, residual -> y, h; dy, h -> dx, dresidual
        pick=lambda output, arguments: output.y,
        dtypes=BOTH_DTYPES,
        options={"dropout_p": 0.1},
        gpu=(16384, 4096),
    ),
    Workload(
        "layer_norm",
        "one_row",
        affine,
        (1, 64),
        (1, 64),
        _eager(_layer_norm),
        _nothing,
        directions=("forward",),
    ),
    Workload(
        "rms_norm",
        "tinyllama",
        _weighted,
        (4096, 2048),
        (17, 96),
        _eager(_rms_norm),
        tensors("x", (2, 3), (5, 10)),
        dtypes=BOTH_DTYPES,
        gpu=(16384, 4096),
    ),
    Workload(
        "dropout_add",
        "gpt2",
        lambda d, rows, cols: {"x": d.normal(rows, cols), "residual": d.normal(rows, cols)},
        (4096, 768),
        (17, 96),
        _eager(_dropout_add),
        tensors("x", (3, 2), (3, 2)),
        dtypes=BOTH_DTYPES,
        options={"dropout_p": 0.1},
        gpu=(16384, 4096),
    ),
    Workload(
        "bias_act",
        "gpt2_gelu_tanh",
        biased,
        (4096, 3072),
        (17, 96),
        _eager(_gelu_tanh),
        tensors("x", (2, 3), (9, 17)),
        dtypes=BOTH_DTYPES,
        options={"activation": "gelu_tanh"},
        gpu=(8192, 8192),
    ),
    Workload(
        "softmax",
        "causal",
        lambda d, *shape: {"x": d.normal(*shape)},
        (8, 12, 512, 512),
        (2, 3, 40, 40),
        _eager(_causal_softmax),
        tensors("x", (1.5, 2), (3, 3)),  # of x, y and dy only the lower triangle need be read
        dtypes=BOTH_DTYPES,
        options={"scale": 0.125, "causal": True},
        gpu=(2, 16, 2048, 2048),
    ),
    Workload(
        "rope",
        "tinyllama",
        _rotated,
        (4, 32, 1024, 64),
        (2, 3, 20, 16),
        _eager(_rope),
        tensors("x", (2, 2), (3, 3)),
        dtypes=BOTH_DTYPES,
        gpu=(4, 32, 4096, 128),
    ),
    Workload(
        "glu",
        "tinyllama_silu",
        _gated,
        (4096, 5632),
        (17, 96),
        _eager(_swiglu),
        tensors("gate", (3, 5), (5, 11)),
        dtypes=BOTH_DTYPES,
        gpu=(8192, 14336),
    ),
    Workload(
        "cross_entropy",
        "small_vocabulary",
        scores,
        (4096, 4096),
        (17, 96),
        _eager(_cross_entropy),
        tensors("logits", (1, 2), (4, 4)),
        dtypes=BOTH_DTYPES,
        gpu=(2048, 128256),
    ),
]
