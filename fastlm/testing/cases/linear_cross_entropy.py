"""Cases of linear_cross_entropy."""

import torch

from . import Case

DIFFERENTIABLE = ("x", "weight", "bias")


def _inputs(d, *shape, classes=41, ignored=0.0, scale=1.0, **options):
    """x of `shape`; the logits have a standard deviation of about `scale`."""
    target = d.integers(0, classes, *shape[:-1]).masked_fill(d.booleans(*shape[:-1], p=ignored), -100)
    weight = d.normal(classes, shape[-1], scale=scale * max(1, shape[-1]) ** -0.5)
    return {"x": d.normal(*shape), "weight": weight, "target": target, **options}


def _ignored_nan(d):
    inputs = _inputs(d, 6, 24, ignore_index=40, label_smoothing=0.1, z_loss=0.1)
    inputs["target"][2] = 40  # at least one row
    inputs["x"][inputs["target"] == 40] = float("nan")
    return inputs


def _nan(d):
    inputs = _inputs(d, 4, 24, reduction="none")
    inputs["x"][1, 5] = float("nan")
    return inputs


def _large(d):
    inputs = _inputs(d, 4, 8192, classes=1025)
    inputs["target"][0] = 1024  # what a product of 1024 classes leaves over, seen in the weight's gradient
    return inputs


CASES = [
    Case("row", lambda d: _inputs(d, 24)),
    Case("odd", lambda d: _inputs(d, 7, 41) | {"bias": d.normal(41)}),
    Case("one-class", lambda d: _inputs(d, 5, 24, classes=1)),
    Case("sum", lambda d: _inputs(d, 7, 24, ignored=0.3, reduction="sum")),
    Case("none", lambda d: _inputs(d, 3, 7, 24, ignored=0.3, reduction="none") | {"bias": d.normal(41)}),
    Case("many-rows", lambda d: _inputs(d, 3, 700, 24, ignored=0.3)),
    Case("many-rows-none", lambda d: _inputs(d, 2100, 24, classes=65, reduction="none")),
    Case("many-classes", lambda d: _inputs(d, 9, 24, classes=9001)),
    Case("label-smoothing", lambda d: _inputs(d, 9, 24, ignored=0.2, label_smoothing=0.1)),
    Case("z-loss", lambda d: _inputs(d, 9, 24, ignored=0.2, z_loss=1e-2)),
    Case(
        "all-options",
        lambda d: (
            _inputs(d, 9, 24, classes=300, label_smoothing=0.2, z_loss=0.5, reduction="sum")
            | {"bias": d.normal(300)}
        ),
    ),
    Case("all-ignored", lambda d: _inputs(d, 7, 24, ignored=1.0, z_loss=0.1)),
    Case("ignored-nan", _ignored_nan),
    Case("packed-slice", lambda d: _inputs(d, 4, 5, 40) | {"x": d.slice_of((4, 5, 120), 40, 40)}),
    Case("transposed", lambda d: _inputs(d, 4, 5, 40) | {"x": d.normal(5, 4, 40).transpose(0, 1)}),
    Case("expanded", lambda d: _inputs(d, 6, 40) | {"x": d.normal(1, 40).expand(6, 40)}),
    Case("strided-weight", lambda d: _inputs(d, 6, 40) | {"weight": d.normal(40, 82, scale=0.2)[:, ::2].t()}),
    Case("target-strided", lambda d: _inputs(d, 6, 40) | {"target": d.integers(0, 41, 6, 2)[:, 1]}),
    Case("empty", lambda d: _inputs(d, 0, 16)),
    Case("no-inputs", lambda d: _inputs(d, 3, 0) | {"bias": d.normal(41)}),
    Case("tens-apart", lambda d: _inputs(d, 6, 24, scale=30.0)),
    Case("hundreds-apart", lambda d: _inputs(d, 6, 24, scale=300.0, label_smoothing=0.1)),
    Case("nan", _nan),
    # on GPUs: dweight as its matmul's own result; more rows than gradients wait for
    Case("large-weight", _large, dtypes=(torch.bfloat16,)),
    Case("many-classes-bias", lambda d: _inputs(d, 3, 24, classes=8208) | {"bias": d.normal(8208)}),
    Case("many-odd-classes-bias", lambda d: _inputs(d, 3, 24, classes=8201) | {"bias": d.normal(8201)}),
    Case("more-rows", lambda d: _inputs(d, 8200, 8, classes=5, ignored=0.1), dtypes=(torch.bfloat16,)),
]
