"""Cases of layer_norm."""

import torch

from . import Case, p_at_a_word

DIFFERENTIABLE = ("x", "weight", "bias", "residual")


def affine(d, *shape):
    """x with a weight around 1 and a bias."""
    cols = shape[-1]
    return {"x": d.normal(*shape), "weight": d.normal(cols) + 1, "bias": d.normal(cols)}


def _float32_parameters(d):
    x = {"x": d.normal(6, 48)}
    return x | {"weight": d.normal(48, dtype=torch.float32), "bias": d.normal(48, dtype=torch.float32)}


def _mixed_parameters(d):
    weight = d.normal(40, dtype=torch.float32)
    return {"x": d.normal(5, 40), "weight": weight, "bias": d.normal(40), "residual": d.normal(5, 40)}


CASES = [
    Case("row", lambda d: {"x": d.normal(64)}),
    Case("one-column", lambda d: {"x": d.normal(5, 1)}),
    Case("odd", lambda d: affine(d, 7, 41)),
    Case("many-rows", lambda d: affine(d, 3, 67, 48)),
    Case("wide", lambda d: affine(d, 3, 5000)),
    Case(
        "wider-than-a-tile",
        lambda d: affine(d, 2, 16390) | {"residual": d.normal(2, 16390), "dropout_p": 0.1, "seed": 2},
    ),
    Case("weight-only", lambda d: {"x": d.normal(6, 33), "weight": d.normal(33)}),
    Case("float32-parameters", _float32_parameters),
    Case("residual", lambda d: affine(d, 2, 9, 41) | {"residual": d.normal(2, 9, 41)}),
    Case("dropout", lambda d: affine(d, 9, 130) | {"dropout_p": p_at_a_word(11, 1), "seed": 11}),
    Case(
        "residual-dropout",
        lambda d: affine(d, 4, 10, 41) | {"residual": d.normal(4, 10, 41), "dropout_p": 0.1, "seed": -3},
    ),
    Case("packed-slice", lambda d: {"x": d.slice_of((4, 5, 120), 40, 40), "weight": d.normal(40)}),
    Case("transposed", lambda d: {"x": d.normal(5, 4, 40).transpose(0, 1), "bias": d.normal(40)}),
    Case("expanded", lambda d: {"x": d.normal(1, 40).expand(6, 40), "residual": d.normal(6, 40)}),
    Case("empty", lambda d: affine(d, 0, 16)),
    Case("extreme", lambda d: {"x": d.normal(4, 40, scale=50.0) + 1000.0, "eps": 1e-5}),
    Case("constant-rows", lambda d: {"x": torch.ones(3, 40, dtype=d.dtype), "weight": d.normal(40)}),
    Case("nan", lambda d: {"x": torch.full((2, 40), float("nan"), dtype=d.dtype)}),
    # A row that a block goes along in whole steps, 16 bytes an access.
    Case("whole-steps", lambda d: affine(d, 2, 16384)),
    Case("mixed-parameters", _mixed_parameters),
    # A program of backward takes more rows than it has on their way.
    Case("rows-on-their-way", lambda d: affine(d, 13, 4000)),
]
