"""What this machine can do at most, measured beside each workload: copying, reading, multiplying matrices.

Matrices are float32 on a CPU, of the workload's dtype on a GPU.
"""

from collections.abc import Callable
from statistics import median

import torch

from .workload import DTYPES, Work

_MOVED = {"cpu": 64 << 20, "cuda": 512 << 20}  # bytes: beyond the caches, and still quick
_SIDE = {"cpu": 1024, "cuda": 4096}
_TENSOR_CORES_SIDE = 8192  # half precision on a GPU: 4096 does not reach its rate


class Ceilings:
    """Three steps to be timed in turn with a workload's, and the rates that their times mean."""

    def __init__(self, device: str, dtype: str):
        kind = torch.device(device).type
        source = torch.ones(_MOVED[kind] // 4, device=device)
        target = torch.empty_like(source)
        # without instructions for it, a CPU multiplies half precision at a hundredth of float32's rate
        half = kind == "cuda" and dtype in ("bf16", "f16")
        side = _TENSOR_CORES_SIDE if half else _SIDE[kind]
        a = torch.randn(side, side, device=device)
        a = a.to(DTYPES[dtype]) if kind == "cuda" else a
        product = torch.empty_like(a)
        self.steps: dict[str, Callable] = {
            "copy": lambda: target.copy_(source),
            "read": lambda: source.sum(),
            "mm": lambda: torch.mm(a, a, out=product),
        }
        self._work = {"copy": 2 * _MOVED[kind], "read": _MOVED[kind], "mm": 2 * side**3}

    def rates(self, times: dict[str, list[float]]) -> dict[str, float]:
        """copy and read in bytes a second, mm in FLOPs a second, of the medians."""
        return {name: self._work[name] / median(times[name]) for name in self.steps}


def floor(work: Work | None, rates: dict[str, float]) -> dict | None:
    """The least time for `work` at these rates, and what bounds it, as {"seconds", "of"}; None for None."""
    if work is None:
        return None
    parts = {work.bound: work.bytes / rates[work.bound], "mm": work.flops / rates["mm"]}
    if work.adds_up:
        return {"seconds": sum(parts.values()), "of": " + ".join(n for n, s in parts.items() if s > 0)}
    of = max(parts, key=parts.get)
    return {"seconds": parts[of], "of": of}
