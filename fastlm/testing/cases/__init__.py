"""The inputs on which every op is tested, benchmarked and verified: one module per op.

A module has DIFFERENTIABLE, the names of the arguments that have a gradient, and CASES.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SEEDS = range(6)  # of a case's draws, judged as one sample: docs/decisions.md has why
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Draw:
    """Random tensors of one dtype from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.dtype, self._generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of standard deviation `scale`."""
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator, dtype=dtype)

    def booleans(self, *shape: int, p: float = 0.5) -> Tensor:
        """True with probability p."""
        return torch.rand(shape, generator=self._generator) < p

    def slice_of(self, shape: tuple[int, ...], start: int, size: int) -> Tensor:
        """Normal numbers as a slice of a wider tensor's last axis: a packed projection's part."""
        return self.normal(*shape)[..., start : start + size]


@dataclass(frozen=True)
class Case:
    """name: what the case is there for. inputs: Draw -> the public function's arguments by name."""

    name: str
    inputs: Callable[[Draw], dict]
    dtypes: tuple[torch.dtype, ...] = DTYPES


def cases_of(op: str) -> tuple[list[Case], tuple[str, ...]]:
    """(cases, names of the differentiable arguments) of an op."""
    module = importlib.import_module(f"{__name__}.{op}")
    return module.CASES, module.DIFFERENTIABLE
