"""csrc/cuda beside Triton, per op and workload: launches, bytes, instructions, registers, occupancy.

python -m fastlm.testing.static_bars.compared [--docs docs/cuda.md]
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..memory_bars import Movement, measure
from ..memory_workloads import BESIDE, WORKLOADS, Workload
from ..pages import table_command
from . import compiled, cuda
from .record import Kernel, described

_TORCHS = ("feed_forward", "linear_cross_entropy")  # whose products of matrices are torch's with csrc/cuda
_BACKENDS = {"cuda": cuda, "triton": compiled}


class Pass(NamedTuple):
    """A forward or a backward. main: of its kernels the one that runs most instructions."""

    movement: Movement
    instructions: float  # of a thread, for each element of the call's largest tensor
    main: Kernel


def passes(workload: Workload, backend: str, arch: int = 80) -> list[Pass]:
    """Forward, and backward if there is one."""
    calls: list[dict] = []

    def note(call) -> None:
        kernels = [kernel for _, kernel in _BACKENDS[backend].launched(arch, call)]
        calls.append({kernel.name: kernel for kernel in kernels})

    torch.manual_seed(0)
    moved = [m for m in measure(workload, f"sm_{arch}", backend, note) if m]
    elements = max(t.numel() for t in workload.arguments().values() if isinstance(t, Tensor))
    found = []
    for movement, kernels in zip(moved, calls, strict=True):
        main = max(movement.instructions, key=movement.instructions.__getitem__)
        (kernel,) = described(arch, [kernels[main]])
        found.append(Pass(movement, sum(movement.instructions.values()) / elements, kernel))
    return found


def markdown(arch: int = 80) -> str:
    """A row for each workload; in its cells forward · backward."""
    head = [f"{what}, {backend}" for what in _CELLS for backend in _BACKENDS]
    lines = [f"| workload | {' | '.join(head)} |", "| --- |" + " --- |" * len(head)]
    for workload in (*WORKLOADS, *BESIDE):
        both = [passes(workload, backend, arch) for backend in _BACKENDS]
        shown = dict.fromkeys(_CELLS, "–") | {"launches": _CELLS["launches"]}
        cells = shown if workload.op in _TORCHS else _CELLS
        row = [
            " · ".join(map(cell, found)) if callable(cell) else cell
            for cell in cells.values()
            for found in both
        ]
        lines.append(f"| {workload.title} | {' | '.join(row)} |")
    return "\n".join(lines)


_CELLS = {
    "launches": lambda p: str(p.movement.launches),
    "bytes": lambda p: f"{p.movement.ratio:.2f}",
    "instructions": lambda p: f"{p.instructions:.1f}",
    "registers": lambda p: str(p.main.registers),
    "resident": lambda p: f"{p.main.occupancy}%",
}


if __name__ == "__main__":
    table_command("static_bars.compared", "compared", markdown)
