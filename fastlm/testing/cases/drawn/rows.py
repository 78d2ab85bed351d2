"""Drawn cases of the ops on rows, and of those with matmuls between."""

from collections.abc import Collection

import torch

from .. import Draw
from ..rope import tables
from .pick import COLS, Pick

_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
_SEQUENCES = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 65, 100, 127, 129)


def softmax(pick: Pick, d: Draw) -> dict:
    """x, causal or not, perhaps with a mask."""
    shape = pick.shape()
    if causal := pick.often(0.3):
        size = min(shape[-1], 130)
        shape = (*shape[:-1][:2], size, size)
    options = {"causal": causal, "scale": pick.choice((1.0, 1.0, 0.125, -2.0))}
    if pick.often(0.4):
        options["mask"] = pick.mask(d, shape)
    return {"x": pick.layout(d, *shape)} | options


def layer_norm(pick: Pick, d: Draw) -> dict:
    """An rms_norm's arguments, and a bias."""
    made = rms_norm(pick, d)
    made.pop("weight_offset")
    return made | {"bias": pick.parameter(d, made["x"].shape[-1])}


def rms_norm(pick: Pick, d: Draw) -> dict:
    """Half of them with a residual, a third with dropout."""
    shape = pick.shape(narrowest=7)  # of 2 or 3 numbers the variance may be next to nothing
    made = {"x": pick.layout(d, *shape), "weight": pick.parameter(d, shape[-1], mean=1.0)} | pick.dropout()
    if pick.often(0.5):
        made["residual"] = pick.layout(d, *shape)
    offset = pick.choice((0.0, 1.0)) if made["weight"] is not None else 0.0
    return made | {"weight_offset": offset, "eps": pick.choice((1e-6, 1e-5, 1e-3))}


def dropout_add(pick: Pick, d: Draw) -> dict:
    """x, with a residual or none."""
    shape = pick.shape()
    residual = pick.layout(d, *shape) if pick.often(0.6) else None
    return {"x": pick.layout(d, *shape), "residual": residual} | pick.dropout()


def bias_act(pick: Pick, d: Draw) -> dict:
    """x, with a bias or none."""
    shape = pick.shape()
    made = {"x": pick.layout(d, *shape), "bias": pick.parameter(d, shape[-1])}
    return made | {"activation": pick.choice(_ACTIVATIONS)} | pick.dropout()


def glu(pick: Pick, d: Draw) -> dict:
    """gate and up, some as the halves of one tensor."""
    *rows, cols = shape = pick.shape()
    gate, up = pick.layout(d, *shape), pick.layout(d, *shape)
    if pick.often(0.3):
        gate, up = d.normal(*rows, 2 * cols).chunk(2, -1)
    return {"gate": gate, "up": up, "activation": pick.choice(("silu", "gelu", "relu"))}


def rope(pick: Pick, d: Draw) -> dict:
    """x with tables for all of its columns, or some."""
    batch, heads, seq = pick.choice((1, 2, 3)), pick.choice((1, 2, 5)), pick.choice(_SEQUENCES)
    dim = pick.choice((2, 3, 8, 16, 20, 41, 64, 96, 128, 130, 256))
    turned = pick.choice((dim // 2 * 2, dim // 2 * 2, 2, max(2, dim // 4 * 2)))
    before = pick.choice(((), (1,), (batch,)))
    made = tables(d, *before, seq, turned, dtype=pick.choice((d.dtype, torch.float32)))
    return {"x": pick.layout(d, batch, heads, seq, dim), "interleaved": pick.often(0.4)} | made


def _loss(pick: Pick, d: Draw, rows: Collection[int], classes: int) -> dict:
    """A loss's target and options; some targets are ignored."""
    ignored = pick.choice((-100, -100, 0, classes - 1))
    target = d.integers(0, classes, *rows)
    target = target.masked_fill(d.booleans(*rows, p=pick.choice((0.0, 0.2, 0.8))), ignored)
    options = {"label_smoothing": pick.choice((0.0, 0.0, 0.1, 1.0)), "z_loss": pick.choice((0.0, 0.0, 1e-2))}
    reduction = pick.choice(("none", "sum", "mean"))
    return {"target": target, "ignore_index": ignored, "reduction": reduction} | options


def cross_entropy(pick: Pick, d: Draw) -> dict:
    """Logits, some targets ignored."""
    *rows, classes = pick.shape()
    return {"logits": pick.layout(d, *rows, classes, scale=3.0)} | _loss(pick, d, rows, classes)


def linear_cross_entropy(pick: Pick, d: Draw) -> dict:
    """The same, of a product."""
    rows, dim, classes = pick.rows(), pick.choice((1, 3, 16, 20, 33, 64, 70)), pick.choice(COLS)
    made = {"x": pick.layout(d, *rows, dim), "weight": pick.layout(d, classes, dim, scale=0.5)}
    made |= {"bias": d.normal(classes) if pick.often(0.5) else None}
    return made | _loss(pick, d, rows, classes)


def feed_forward(pick: Pick, d: Draw) -> dict:
    """Weights and biases, with or without dropout."""
    dim, hidden, out = (pick.choice((1, 3, 8, 16, 20, 33, 64, 70, 130)) for _ in range(3))
    made = {"x": pick.layout(d, *pick.rows(), dim)}
    made |= {"w1": pick.layout(d, hidden, dim, scale=0.3), "w2": pick.layout(d, out, hidden, scale=0.3)}
    made |= {"b1": d.normal(hidden) if pick.often(0.7) else None}
    made |= {"b2": d.normal(out) if pick.often(0.7) else None}
    return made | {"activation": pick.choice(_ACTIVATIONS)} | pick.dropout()
