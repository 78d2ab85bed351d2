"""Cases of rms_norm."""

import torch

from . import Case, p_at_a_word

DIFFERENTIABLE = ("x", "weight", "residual")


def _scaled(d, *shape):
    return {"x": d.normal(*shape), "weight": d.normal(shape[-1]) + 1}


CASES = [
    Case("row", lambda d: {"x": d.normal(64)}),
    Case("one-column", lambda d: {"x": d.normal(65, 1)}),
    Case("odd", lambda d: _scaled(d, 7, 41)),
    Case("many-rows", lambda d: _scaled(d, 3, 67, 48)),
    Case("wide", lambda d: _scaled(d, 3, 5000)),
    Case("wider-than-a-tile", lambda d: _scaled(d, 2, 16390) | {"weight_offset": 1.0}),
    Case("offset", lambda d: {"x": d.normal(6, 33), "weight": d.normal(33), "weight_offset": 1.0}),
    Case("float32-weight", lambda d: {"x": d.normal(6, 48), "weight": d.normal(48, dtype=torch.float32)}),
    Case("residual", lambda d: _scaled(d, 2, 9, 41) | {"residual": d.normal(2, 9, 41)}),
    Case("dropout", lambda d: _scaled(d, 9, 130) | {"dropout_p": p_at_a_word(11, 1), "seed": 11}),
    Case(
        "residual-dropout",
        lambda d: (
            _scaled(d, 4, 10, 41)
            | {"weight_offset": -0.5, "residual": d.normal(4, 10, 41), "dropout_p": 0.1, "seed": -3}
        ),
    ),
    Case("packed-slice", lambda d: {"x": d.slice_of((4, 5, 120), 40, 40), "weight": d.normal(40)}),
    Case("transposed", lambda d: {"x": d.normal(5, 4, 40).transpose(0, 1), "weight": d.normal(40)}),
    Case("expanded", lambda d: {"x": d.normal(1, 40).expand(6, 40), "residual": d.normal(6, 40)}),
    Case("empty", lambda d: _scaled(d, 0, 16)),
    Case("extreme", lambda d: {"x": d.normal(4, 40, scale=50.0) + 1000.0, "eps": 1e-5}),
    Case("tiny", lambda d: {"x": d.normal(4, 40, scale=1e-4), "weight": d.normal(40)}),
    Case("zero-rows", lambda d: {"x": torch.zeros(3, 40, dtype=d.dtype), "weight": d.normal(40)}),
    Case("nan", lambda d: {"x": torch.full((2, 40), float("nan"), dtype=d.dtype)}),
    # A row that a block goes along in whole steps, 16 bytes an access.
    Case("whole-steps", lambda d: _scaled(d, 2, 16384)),
    # A program of backward takes more rows than it has on their way.
    Case("rows-on-their-way", lambda d: {"x": d.normal(13, 4000), "weight": d.normal(4000) + 1}),
]
