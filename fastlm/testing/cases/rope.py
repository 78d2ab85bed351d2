"""Cases of rope."""

import torch

from . import Case

DIFFERENTIABLE = ("x",)


def tables(d, *shape, dtype=None):
    """cos and sin of random angles [..., seq, n / 2], both halves alike as in Hugging Face's tables."""
    angles = d.normal(*shape[:-1], shape[-1] // 2, scale=3.0, dtype=torch.float32)
    angles = torch.cat((angles, angles), -1)
    return {"cos": angles.cos().to(dtype or d.dtype), "sin": angles.sin().to(dtype or d.dtype)}


def _rotated(d, batch, heads, seq, dim):
    return {"x": d.normal(batch, heads, seq, dim)} | tables(d, seq, dim)


def _packed(d):
    """Queries out of one packed projection: heads stand behind the sequence, rows lie far apart."""
    x = d.normal(2, 9, 3, 4, 32)[:, :, 1].transpose(1, 2)
    return {"x": x} | tables(d, 2, 9, 32)


CASES = [
    Case("row", lambda d: _rotated(d, 1, 1, 1, 64)),
    Case("odd", lambda d: _rotated(d, 2, 3, 7, 22)),
    Case("plain", lambda d: _rotated(d, 2, 3, 17, 64)),
    Case("interleaved", lambda d: _rotated(d, 2, 3, 17, 22) | {"interleaved": True}),
    Case("one-pair", lambda d: _rotated(d, 2, 3, 5, 2)),
    Case("per-sequence", lambda d: {"x": d.normal(3, 2, 5, 24)} | tables(d, 3, 5, 24)),
    Case("one-table", lambda d: {"x": d.normal(3, 2, 5, 24)} | tables(d, 1, 5, 24)),
    Case("partial", lambda d: {"x": d.normal(2, 3, 7, 41)} | tables(d, 7, 10)),
    Case(
        "partial-interleaved", lambda d: {"x": d.normal(2, 3, 7, 41), "interleaved": True} | tables(d, 7, 10)
    ),
    Case("float32-tables", lambda d: {"x": d.normal(2, 3, 7, 16)} | tables(d, 7, 16, dtype=torch.float32)),
    Case(
        "unlike-halves",
        lambda d: {"x": d.normal(2, 3, 7, 16), "cos": d.normal(7, 16), "sin": d.normal(7, 16)},
    ),
    Case("tables-slice", lambda d: _rotated(d, 1, 2, 6, 16) | {"sin": d.slice_of((6, 40), 3, 16)}),
    Case("packed", _packed),
    # more heads than 512: a program of the Triton kernel turns two of them, the last program one
    Case("many-heads", lambda d: _rotated(d, 1, 515, 3, 16), dtypes=(torch.float16, torch.bfloat16)),
    Case(
        "many-heads-interleaved",
        lambda d: _rotated(d, 1, 515, 3, 22) | {"interleaved": True},
        dtypes=(torch.float32, torch.bfloat16),
    ),
    Case("long", lambda d: {"x": d.normal(2, 150, 5, 16).transpose(1, 2)} | tables(d, 150, 16)),
    Case(
        "last-axis-strided", lambda d: _rotated(d, 2, 3, 8, 8) | {"x": d.normal(2, 3, 8, 8).transpose(2, 3)}
    ),
    Case("expanded", lambda d: _rotated(d, 2, 3, 7, 16) | {"x": d.normal(2, 1, 7, 16).expand(2, 3, 7, 16)}),
    Case("empty", lambda d: _rotated(d, 2, 3, 0, 16)),
    Case("no-sequences", lambda d: _rotated(d, 0, 3, 4, 16)),
    Case(
        "nan",
        lambda d: _rotated(d, 1, 2, 3, 16) | {"x": torch.full((1, 2, 3, 16), float("nan"), dtype=d.dtype)},
    ),
]
