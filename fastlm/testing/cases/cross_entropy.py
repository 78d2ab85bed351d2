"""Cases of cross_entropy."""

import torch

from . import Case

DIFFERENTIABLE = ("logits",)


def scores(d, *shape, scale=1.0, ignored=0.0):
    """Logits and targets, a share `ignored` of which count for nothing."""
    target = d.integers(0, shape[-1], *shape[:-1])
    target = target.masked_fill(d.booleans(*shape[:-1], p=ignored), -100)
    return {"logits": d.normal(*shape, scale=scale), "target": target}


def _ignored_nan(d):
    inputs = scores(d, 6, 41)
    inputs["target"][2] = 40  # at least one row
    inputs["logits"][inputs["target"] == 40] = float("nan")
    return inputs | {"ignore_index": 40, "label_smoothing": 0.1, "z_loss": 0.1}


def _masked_classes(d):
    inputs = scores(d, 9, 41)
    classes = d.booleans(9, 41).scatter(1, inputs["target"][:, None], False)
    return inputs | {"logits": inputs["logits"].masked_fill(classes, float("-inf"))}


def _masked_target(d):
    inputs = scores(d, 4, 41)
    inputs["logits"][1, inputs["target"][1]] = float("-inf")
    inputs["logits"][2, 5] = float("-inf")
    return inputs | {"label_smoothing": 0.1, "reduction": "none"}


def _nan(d):
    inputs = scores(d, 4, 41)
    inputs["logits"][1, 5] = float("nan")
    return inputs | {"reduction": "none"}


CASES = [
    Case("row", lambda d: scores(d, 64)),
    Case("odd", lambda d: scores(d, 7, 41)),
    Case("one-class", lambda d: scores(d, 5, 1)),
    Case("sum", lambda d: scores(d, 7, 41, ignored=0.3) | {"reduction": "sum"}),
    Case("none", lambda d: scores(d, 3, 7, 41, ignored=0.3) | {"reduction": "none"}),
    Case("many-rows", lambda d: scores(d, 3, 700, 48, ignored=0.3)),
    Case("wide", lambda d: scores(d, 3, 9001)),
    Case("label-smoothing", lambda d: scores(d, 9, 41, ignored=0.2) | {"label_smoothing": 0.1}),
    Case("only-smoothing", lambda d: scores(d, 9, 41) | {"label_smoothing": 1.0, "reduction": "none"}),
    Case("z-loss", lambda d: scores(d, 9, 41, ignored=0.2) | {"z_loss": 1e-2}),
    Case(
        "all-options",
        lambda d: scores(d, 9, 3000) | {"z_loss": 0.5, "label_smoothing": 0.2, "reduction": "sum"},
    ),
    Case("all-ignored", lambda d: scores(d, 7, 41, ignored=1.0) | {"z_loss": 0.1}),
    Case("ignored-nan", _ignored_nan),
    Case("packed-slice", lambda d: scores(d, 4, 5, 40) | {"logits": d.slice_of((4, 5, 120), 40, 40)}),
    Case("transposed", lambda d: scores(d, 4, 5, 40) | {"logits": d.normal(5, 4, 40).transpose(0, 1)}),
    Case("expanded", lambda d: scores(d, 6, 40) | {"logits": d.normal(1, 40).expand(6, 40)}),
    Case("target-strided", lambda d: scores(d, 6, 40) | {"target": d.integers(0, 40, 6, 2)[:, 1]}),
    Case("empty", lambda d: scores(d, 0, 16)),
    Case("tens-apart", lambda d: scores(d, 6, 41, scale=30.0)),
    Case("extreme", lambda d: scores(d, 6, 41, scale=1e4) | {"label_smoothing": 0.1}),
    Case("offset", lambda d: scores(d, 6, 41) | {"logits": d.normal(6, 41) + 1e4}),
    Case("masked-classes", _masked_classes),
    Case("masked-target", _masked_target),
    Case(
        "only-minus-infinity",
        lambda d: scores(d, 2, 40) | {"logits": torch.full((2, 40), -torch.inf).to(d.dtype)},
    ),
    Case("nan", _nan),
]
