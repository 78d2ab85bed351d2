"""Cases of dropout_add."""

from . import Case, p_at_a_word

DIFFERENTIABLE = ("x", "residual")

CASES = [
    Case("row", lambda d: {"x": d.normal(64), "dropout_p": 0.5, "seed": 1}),
    Case("odd", lambda d: {"x": d.normal(7, 41), "residual": d.normal(7, 41), "dropout_p": 0.1, "seed": 2}),
    Case("no-dropout", lambda d: {"x": d.normal(7, 41), "residual": d.normal(7, 41)}),
    Case("no-residual", lambda d: {"x": d.normal(3, 5, 130), "dropout_p": 0.9, "seed": -7}),
    Case("scalar", lambda d: {"x": d.normal(), "dropout_p": 0.2, "seed": 4}),
    Case("wide", lambda d: {"x": d.normal(3, 2500), "dropout_p": p_at_a_word(11, 1), "seed": 11}),
    Case("packed-slice", lambda d: {"x": d.slice_of((4, 5, 120), 40, 40), "dropout_p": 0.3, "seed": 6}),
    Case("expanded", lambda d: {"x": d.normal(1, 40).expand(6, 40), "dropout_p": 0.3, "seed": 7}),
    Case("empty", lambda d: {"x": d.normal(0, 16), "dropout_p": 0.3, "seed": 8}),
]
