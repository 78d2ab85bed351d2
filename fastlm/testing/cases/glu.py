"""Cases of glu."""

import torch

from . import Case
from .bias_act import ACTIVATIONS

DIFFERENTIABLE = ("gate", "up")


def _pair(d, *shape):
    return {"gate": d.normal(*shape), "up": d.normal(*shape)}


def _packed(d):
    """The two halves of one projection."""
    gate, up = d.normal(4, 5, 82).chunk(2, -1)
    return {"gate": gate, "up": up}


def _infinities(d):
    gate = torch.tensor([[float("inf"), 1.0, -float("inf"), 0.0]], dtype=d.dtype)
    return {"gate": gate, "up": torch.tensor([[2.0, float("inf"), -1.0, 3.0]], dtype=d.dtype)}


def _each(name, inputs, activations=ACTIVATIONS):
    return [Case(f"{name}-{a}", lambda d, a=a: inputs(d) | {"activation": a}) for a in activations]


CASES = [
    Case("row", lambda d: _pair(d, 64)),
    Case("odd", lambda d: _pair(d, 7, 41)),
    Case("scalar", lambda d: _pair(d)),
    Case("one-column", lambda d: _pair(d, 5, 1)),
    *_each("rows", lambda d: _pair(d, 7, 43)),
    Case("many-rows", lambda d: _pair(d, 3, 67, 48)),
    Case("wide", lambda d: _pair(d, 3, 5000)),
    Case("packed", _packed),
    Case("transposed", lambda d: {"gate": d.normal(5, 4, 40).transpose(0, 1), "up": d.normal(4, 5, 40)}),
    Case("expanded", lambda d: {"gate": d.normal(1, 40).expand(6, 40), "up": d.normal(6, 1).expand(6, 40)}),
    Case("empty", lambda d: _pair(d, 0, 16)),
    Case("no-columns", lambda d: _pair(d, 3, 0)),
    *_each("extreme", lambda d: {"gate": d.normal(4, 40, scale=100.0), "up": d.normal(4, 40, scale=10.0)}),
    *_each(
        "nan", lambda d: {"gate": torch.full((2, 40), float("nan"), dtype=d.dtype), "up": d.normal(2, 40)}
    ),
    *_each("infinite", _infinities, ("relu", "silu")),  # torch's float32 gelu(inf) is NaN
]
