"""The inputs on which every op is tested, benchmarked and verified: one module per op.

A module has DIFFERENTIABLE, the names of the arguments that have a gradient, and CASES; and CASES_OF by
backend, if one's kernels take only some shapes.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._philox import philox

SEEDS = range(6)  # of a case's draws, judged as one sample: docs/decisions.md has why
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Draw:
    """Random tensors of one dtype from one seed, drawn on one device: another device's numbers are others."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str = "cpu"):
        self.dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of standard deviation `scale`."""
        drawn = torch.randn(shape, generator=self._generator, device=self._device)
        return (drawn * scale).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers in [low, high)."""
        drawn_by = {"generator": self._generator, "device": self._device}
        return torch.randint(low, high, shape, dtype=dtype, **drawn_by)

    def booleans(self, *shape: int, p: float = 0.5) -> Tensor:
        """True with probability p."""
        return torch.rand(shape, generator=self._generator, device=self._device) < p

    def slice_of(self, shape: tuple[int, ...], start: int, size: int) -> Tensor:
        """Normal numbers as a slice of a wider tensor's last axis: a packed projection's part."""
        return self.normal(*shape)[..., start : start + size]


@dataclass(frozen=True)
class Case:
    """name: what the case is there for. inputs: Draw -> the public function's arguments by name."""

    name: str
    inputs: Callable[[Draw], dict]
    dtypes: tuple[torch.dtype, ...] = DTYPES


def p_at_a_word(seed: int, row: int, word: int = 0) -> float:
    """The dropout_p whose threshold is a drawn word: of one of columns 0 to 3 of a row, or such keys of a
    query of head 0.

    That element is kept, by nothing to spare: a kernel that compares with > for >= drops it.
    """
    return philox(torch.tensor([seed]), (0, row, 0, 0))[word].item() / 4294967296.0


def cases_of(op: str, backend: str | None = None) -> tuple[list[Case], tuple[str, ...]]:
    """(cases, names of the differentiable arguments) of an op; backend: in shapes that its kernels take."""
    module = importlib.import_module(f"{__name__}.{op}")
    return getattr(module, "CASES_OF", {}).get(backend, module.CASES), module.DIFFERENTIABLE
