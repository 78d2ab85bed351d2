"""What is drawn of a case beside its numbers."""

import random

import torch
from torch import Tensor

from .. import Draw

COLS = (1, 2, 3, 7, 8, 16, 31, 33, 64, 65, 100, 127, 128, 129, 200, 256, 257, 384, 500, 512, 513, 768)
_WIDE_COLS = (1000, 1024, 1025, 2048, 3000, 4096, 4097, 8200)


class Pick(random.Random):
    """Draws what a case is, not its numbers."""

    def often(self, p: float) -> bool:
        """True with probability p."""
        return self.random() < p

    def layout(
        self, d: Draw, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None, tokens: int = -1
    ) -> Tensor:
        """Normal numbers that lie whole, in gaps, with axes in another order, again and again, or last apart.

        tokens: the axis along which nothing is repeated.
        """
        kind = self.choice(("whole", "whole", "gaps", "order", "order and gaps", "again", "apart"))
        dims = len(shape)
        if kind == "again" and dims > 2:
            axis = self.choice([a for a in range(dims - 1) if a != tokens])
            one = (*shape[:axis], 1, *shape[axis + 1 :])
            return d.normal(*one, scale=scale, dtype=dtype).expand(shape)
        if kind == "apart" and dims > 1:
            return d.normal(*shape[:-2], shape[-1], shape[-2], scale=scale, dtype=dtype).transpose(-1, -2)
        order = list(range(dims - 1))
        if "order" in kind:
            self.shuffle(order)
        before, after = (self.choice((0, 1, 3, 8)), self.choice((0, 2, 5, 8))) if "gaps" in kind else (0, 0)
        lies = [*(shape[a] for a in order), before + shape[-1] + after]
        t = d.normal(*lies, scale=scale, dtype=dtype)[..., before : before + shape[-1]]
        return t.permute(*(order.index(a) for a in range(dims - 1)), dims - 1)

    def rows(self) -> tuple[int, ...]:
        """The axes before the last."""
        return self.choice(((), (1,), (3,), (33,), (5, 17), (2, 3, 19), (70,)))

    def shape(self, narrowest: int = 1) -> tuple[int, ...]:
        """Rows of at least so many columns; of a thousand columns or more fewer rows."""
        cols = self.choice([c for c in COLS + _WIDE_COLS if c >= narrowest])
        few = ((), (1,), (2,), (7,), (3, 5))
        return (*(self.rows() if cols < 1000 else self.choice(few)), cols)

    def dropout(self) -> dict:
        """dropout_p and seed by name, or neither; of ten times as much attention is a small difference."""
        if not self.often(0.35):
            return {}
        return {"dropout_p": self.choice((0.1, 0.25, 0.5)), "seed": self.randrange(-(2**63), 2**63)}

    def parameter(self, d: Draw, cols: int, mean: float = 0.0) -> Tensor | None:
        """None, or [cols] in x's dtype or in float32, whole or from within a longer one."""
        if self.often(0.25):
            return None
        dtype = self.choice((d.dtype, torch.float32))
        start = self.choice((0, 0, 1, 4))
        return (d.normal(cols + start, dtype=dtype) + mean)[start:]

    def mask(self, d: Draw, shape: tuple[int, ...]) -> Tensor:
        """Boolean, of a shape that broadcasts to `shape`, whole or seen through another order."""
        own = tuple(1 if self.often(0.3) else n for n in shape)[self.randrange(len(shape)) if shape else 0 :]
        p = self.choice((0.1, 0.5, 0.9))
        if len(own) > 1 and self.often(0.3):
            return d.booleans(*own[:-2], own[-1], own[-2], p=p).transpose(-1, -2)
        return d.booleans(*own, p=p)
