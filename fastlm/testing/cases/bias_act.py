"""Cases of bias_act."""

import torch

from . import Case, p_at_a_word

DIFFERENTIABLE = ("x", "bias")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def biased(d, *shape):
    """x, and a bias of its last axis."""
    return {"x": d.normal(*shape), "bias": d.normal(shape[-1])}


def _infinities(d):
    return {"x": torch.tensor([[float("inf"), 1.0, -float("inf"), 0.0]], dtype=d.dtype)}


def _each(name, inputs, activations=ACTIVATIONS):
    return [Case(f"{name}-{a}", lambda d, a=a: inputs(d) | {"activation": a}) for a in activations]


CASES = [
    Case("row", lambda d: {"x": d.normal(64)}),
    Case("scalar", lambda d: {"x": d.normal()}),
    Case("one-column", lambda d: biased(d, 5, 1)),
    *_each("odd", lambda d: biased(d, 7, 41)),
    *_each("dropout", lambda d: biased(d, 9, 130) | {"dropout_p": p_at_a_word(11, 1), "seed": 11}),
    Case("many-rows", lambda d: biased(d, 3, 67, 48) | {"dropout_p": 0.1, "seed": 3}),
    Case("wide", lambda d: biased(d, 3, 5000) | {"dropout_p": 0.5, "seed": -4}),
    Case("float32-bias", lambda d: {"x": d.normal(6, 48), "bias": d.normal(48, dtype=torch.float32)}),
    Case("packed-slice", lambda d: {"x": d.slice_of((4, 5, 120), 40, 40), "bias": d.normal(40)}),
    Case("transposed", lambda d: {"x": d.normal(5, 4, 40).transpose(0, 1), "bias": d.normal(40)}),
    Case("expanded", lambda d: {"x": d.normal(1, 136).expand(20, 136), "bias": d.normal(1).expand(136)}),
    Case("empty", lambda d: biased(d, 0, 16)),
    Case("no-columns", lambda d: biased(d, 3, 0)),
    *_each("extreme", lambda d: {"x": d.normal(4, 40, scale=100.0)}),
    *_each("nan", lambda d: {"x": torch.full((2, 40), float("nan"), dtype=d.dtype), "bias": d.normal(40)}),
    *_each("infinite", _infinities, ("gelu_tanh", "relu", "silu")),  # torch's float32 gelu(inf) is NaN
]
