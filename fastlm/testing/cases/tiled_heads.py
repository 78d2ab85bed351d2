"""Attention's cases for kernels that have tiles of a few head dims alone: heads as wide as one of them."""

import torch
from torch import Tensor

from . import Case, Draw

WIDTHS = (32, 64, 96, 128, 256)  # what csrc/cuda has tiles of
_SCALE = 0.7  # of new columns: scores and gradients grow little
_SCALE_OF_KEYS = {"extreme": 0.035}  # scores that compete must go on doing so


def tokens(d: Draw, count: int) -> int:
    """count, or 0.6 of it in float32: its tiles are smaller, and ptxsim needs longest for them."""
    return count * 3 // 5 if d.dtype == torch.float32 else count


def tiled(cases: list[Case]) -> list[Case]:
    """Every case with q, k and v as wide as the next of WIDTHS."""
    return [Case(c.name, _in_tiles(c), c.dtypes) for c in cases]


def _in_tiles(case: Case):
    def made(d: Draw) -> dict:
        inputs = case.inputs(d)
        dim = next(w for w in WIDTHS if w >= max(inputs["q"].shape[-1], inputs["v"].shape[-1]))
        of_keys = _SCALE_OF_KEYS.get(case.name, _SCALE)
        scales = {"q": _SCALE, "k": of_keys, "v": of_keys}
        return inputs | {name: widened(d, inputs[name], dim, scale) for name, scale in scales.items()}

    return made


def widened(d: Draw, t: Tensor, dim: int, scale: float) -> Tensor:
    """t with new columns up to `dim`, NaN where its row has one; axes lie in memory in t's order.

    Not copies of its columns: gradients then hang on one number's rounding, in float16 2.3 times the rule.
    """
    if t.shape[-1] == dim:
        return t
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    wide = torch.cat([t, d.normal(*t.shape[:-1], dim - t.shape[-1], scale=scale)], -1)
    wide = wide.masked_fill(t.isnan().any(-1, keepdim=True), float("nan"))
    return wide.permute(order).contiguous().permute([order.index(axis) for axis in range(t.dim())])
