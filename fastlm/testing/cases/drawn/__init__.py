"""Cases by number, without end: sizes, options, layouts in memory and wanted gradients are drawn.

drawn("attention", 7) is the same case everywhere. The cases by name say what they are for; these are for
what nobody thought of: two options at once, a layout, an odd size beside a gradient that nobody wants.

Left to the cases by name is where a gradient is 0 but for rounding, as q's is with one key, or keys that are
all alike: there the reference is exact by luck, and 2 * 0 is no measure.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from .. import Case, Draw, cases_of
from . import attentions, rows
from .pick import Pick

_ATTENTIONS = ("attention", "attention_varlen", "decode_attention", "append_kv")


def drawn(op: str, number: int) -> tuple[Case, tuple[str, ...]]:
    """(the number-th drawn case of an op, the arguments whose gradients it wants)."""
    maker = getattr(attentions if op in _ATTENTIONS else rows, op)

    def inputs(d: Draw) -> dict:
        return maker(Pick(f"{op} {number}"), d)

    pick, differentiable = Pick(f"gradients {op} {number}"), cases_of(op)[1]
    wanted = differentiable if pick.often(0.6) else tuple(n for n in differentiable if pick.often(0.5))
    return Case(f"drawn-{number}", inputs), wanted


def cotangents(op: str, number: int, outputs: Collection[Tensor]) -> list[Tensor]:
    """What the gradients of such a case begin with, one per output, in layouts that are drawn too."""
    pick, d = Pick(f"cotangents {op} {number}"), Draw(number, torch.float32)
    drawn = [pick.layout(d, *o.shape) if o.dim() else d.normal() for o in outputs]
    return [t.to(o.device, o.dtype) for t, o in zip(drawn, outputs, strict=True)]
