"""Cases of feed_forward."""

import torch

from . import Case, p_at_a_word

DIFFERENTIABLE = ("x", "w1", "b1", "w2", "b2")
_HALVES = (torch.float16, torch.bfloat16)  # asynchronous copies; sums over more tiles than are loaded ahead


def layer(d, size, hidden, out):
    """Weights scaled as nn.Linear's, so that values keep their size."""
    first = {"w1": d.normal(hidden, size, scale=max(1, size) ** -0.5), "b1": d.normal(hidden)}
    return first | {
        "w2": d.normal(out, hidden, scale=max(1, hidden) ** -0.5),
        "b2": d.normal(out),
    }


def _strided_weights(d):
    w1, w2 = d.normal(24, 96, scale=0.2), d.normal(96, 40, scale=0.1)
    return {"x": d.normal(5, 24), "w1": w1.t(), "b1": d.normal(96), "w2": w2[:, :24].t(), "b2": None}


def _relu(d):
    """One hidden value is 0 in every row: its gradient is 0."""
    inputs = {"x": d.normal(7, 41), "activation": "relu"} | layer(d, 41, 67, 13)
    inputs["w1"][3], inputs["b1"][3] = 0.0, 0.0
    return inputs


CASES = [
    Case("row", lambda d: {"x": d.normal(24)} | layer(d, 24, 96, 24)),
    Case("odd", lambda d: {"x": d.normal(7, 41)} | layer(d, 41, 67, 13)),
    *(
        Case(a, lambda d, a=a: {"x": d.normal(7, 41), "activation": a} | layer(d, 41, 67, 13))
        for a in ("gelu_tanh", "silu")
    ),
    Case("relu", _relu),
    Case(
        "dropout",
        lambda d: (
            {"x": d.normal(3, 11, 40), "dropout_p": p_at_a_word(11, 1), "seed": 11} | layer(d, 40, 160, 40)
        ),
    ),
    Case("no-biases", lambda d: {"x": d.normal(2, 9, 40)} | layer(d, 40, 64, 24) | {"b1": None, "b2": None}),
    Case("packed-slice", lambda d: {"x": d.slice_of((4, 5, 120), 40, 40)} | layer(d, 40, 64, 24)),
    Case("transposed", lambda d: {"x": d.normal(5, 4, 40).transpose(0, 1)} | layer(d, 40, 64, 24)),
    Case("expanded", lambda d: {"x": d.normal(1, 40).expand(6, 40)} | layer(d, 40, 64, 24)),
    Case("strided-weights", _strided_weights),
    Case("wide", lambda d: {"x": d.normal(20, 40), "dropout_p": 0.1, "seed": -6} | layer(d, 40, 1100, 40)),
    Case("long-sum", lambda d: {"x": d.normal(4, 16)} | layer(d, 16, 2100, 16), (torch.float32,)),
    Case("deep", lambda d: {"x": d.normal(20, 208)} | layer(d, 208, 208, 208), _HALVES),
    Case("deep-few", lambda d: {"x": d.normal(5, 288)} | layer(d, 288, 288, 288), _HALVES),
    Case("deep-mixed", lambda d: {"x": d.normal(20, 208)} | layer(d, 208, 210, 208), _HALVES),
    Case("many-rows", lambda d: {"x": d.normal(208, 16)} | layer(d, 16, 48, 16), _HALVES),
    Case("empty", lambda d: {"x": d.normal(0, 16), "dropout_p": 0.3, "seed": 8} | layer(d, 16, 32, 16)),
    Case("no-inputs", lambda d: {"x": d.normal(3, 0)} | layer(d, 0, 32, 16)),
    Case("no-hidden", lambda d: {"x": d.normal(3, 16)} | layer(d, 16, 0, 16)),
    Case("nan", lambda d: {"x": torch.full((2, 16), float("nan"), dtype=d.dtype)} | layer(d, 16, 32, 16)),
]
