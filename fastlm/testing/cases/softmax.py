"""Cases of softmax."""

import torch

from . import Case

DIFFERENTIABLE = ("x",)


def _all_masked_row(d):
    mask = d.booleans(2, 9, 41)
    mask[0, 3] = False
    mask[1] = False
    return {"x": d.normal(2, 9, 41), "mask": mask}


def _left_padding(d):
    keep = torch.arange(24) >= torch.tensor([0, 5, 23])[:, None]
    return {"x": d.normal(3, 2, 24, 24), "mask": keep[:, None, None, :], "causal": True, "scale": 0.3}


def _nan_at_masked(d):
    x, mask = d.normal(4, 40), d.booleans(4, 40)
    return {"x": x.masked_fill(~mask, float("nan")), "mask": mask}


def _one_nan(d):
    x = d.normal(3, 6, 40)
    x[1, 2, 7] = float("nan")
    return {"x": x}


def _wider_than_a_tile(d):
    mask = d.booleans(2, 16390)
    mask[0] = False
    return {"x": d.normal(2, 16390), "mask": mask, "scale": 3.0}


CASES = [
    Case("row", lambda d: {"x": d.normal(64)}),
    Case("odd", lambda d: {"x": d.normal(7, 41)}),
    Case("scalar", lambda d: {"x": d.normal()}),
    Case("one-column", lambda d: {"x": d.normal(5, 1)}),
    Case("wide", lambda d: {"x": d.normal(3, 5000)}),
    Case("wider-than-a-tile", _wider_than_a_tile),
    Case("many-rows", lambda d: {"x": d.normal(3, 700, 48)}),
    Case("scale", lambda d: {"x": d.normal(7, 41), "scale": 0.125}),
    Case("negative-scale", lambda d: {"x": d.normal(7, 41), "scale": -3.0}),
    Case("zero-scale", lambda d: {"x": d.normal(7, 41), "scale": 0.0}),
    Case("causal", lambda d: {"x": d.normal(2, 3, 67, 67), "causal": True, "scale": 0.125}),
    Case("causal-one", lambda d: {"x": d.normal(1, 1), "causal": True}),
    Case("mask", lambda d: {"x": d.normal(2, 9, 41), "mask": d.booleans(2, 9, 41)}),
    Case("mask-of-keys", lambda d: {"x": d.normal(3, 2, 9, 41), "mask": d.booleans(3, 1, 1, 41)}),
    Case("mask-of-rows", lambda d: {"x": d.normal(3, 2, 9, 41), "mask": d.booleans(9, 1)}),
    Case("mask-transposed", lambda d: {"x": d.normal(2, 9, 41), "mask": d.booleans(41, 9).t()}),
    Case(
        "mask-sliced",
        lambda d: {"x": d.normal(2, 3, 9, 41), "mask": d.booleans(2, 5, 12, 82)[:, 1:4, 3:, ::2]},
    ),
    Case("all-masked-row", _all_masked_row),
    Case("left-padding", _left_padding),
    Case("packed-slice", lambda d: {"x": d.slice_of((4, 5, 120), 40, 40), "scale": 0.5}),
    Case("transposed", lambda d: {"x": d.normal(5, 4, 40).transpose(0, 1), "mask": d.booleans(5, 40)}),
    Case("expanded", lambda d: {"x": d.normal(1, 40).expand(6, 40)}),
    Case("empty", lambda d: {"x": d.normal(0, 16)}),
    Case("no-columns", lambda d: {"x": d.normal(3, 0)}),
    Case("extreme", lambda d: {"x": d.normal(6, 41, scale=1e4)}),
    Case("offset", lambda d: {"x": d.normal(6, 41, scale=10.0) + 1e4}),
    Case("only-minus-infinity", lambda d: {"x": torch.full((2, 40), float("-inf"), dtype=d.dtype)}),
    Case("nan", _one_nan),
    Case("nan-at-masked", _nan_at_masked),
    # Rows that are read 16 bytes at a time, with a mask that cannot be: strided, or beginning anywhere.
    Case("mask-strided", lambda d: {"x": d.normal(2, 16, 24), "mask": d.booleans(24, 16).t()}),
    Case("mask-unaligned", lambda d: {"x": d.normal(2, 9, 40), "mask": d.booleans(2, 9, 43)[..., 1:41]}),
    # A row that a block goes along in whole steps, 16 bytes an access.
    Case("whole-steps", lambda d: {"x": d.normal(2, 16384)}),
]
