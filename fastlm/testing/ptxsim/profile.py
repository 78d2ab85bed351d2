"""Counts what a launch does: its instructions, sectors of global memory and wavefronts of shared memory.

An instruction of PTX that any thread of a warp runs counts for its 32 threads, as they wait for it; mov, of
which machine code has few, counts for none.
A warp's access to global memory moves whole sectors of 32 bytes: ideal is as many as its distinct bytes fill.
Shared memory has 32 banks of 4 bytes: a wavefront serves one word of each; ideal is 128 bytes a wavefront.
Source: NVIDIA, Nsight Compute, "Memory tables", https://docs.nvidia.com/nsight-compute/ProfilingGuide/.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

SECTOR, BANKS, WORD = 32, 32, 4


@dataclass
class Traffic:
    """Of one tensor in one kernel, or of a kernel's shared memory; unique: bytes that were touched at all."""

    sectors: int = 0
    ideal: int = 0
    bytes: int = 0
    touched: list = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Over ideal."""
        return self.sectors / self.ideal if self.ideal else 1.0

    @property
    def unique(self) -> int:
        """Bytes of all distinct sectors."""
        return SECTOR * np.unique(np.concatenate(self.touched)).size if self.touched else 0


class Profile:
    """What `ptxsim.device(arch, profile=...)` fills: traffic by (kernel, "read" or "write", tensor)."""

    def __init__(self):
        self.launches: list[tuple[str, tuple, tuple]] = []
        self.memory_traffic: dict[tuple[str, str, str], Traffic] = defaultdict(Traffic)
        self.shared_traffic: dict[str, Traffic] = defaultdict(Traffic)
        self.instructions: dict[str, int] = defaultdict(int)  # of each kernel, of all threads

    def start(self, kernel: str, grid: tuple, threads: tuple) -> None:
        """A launch begins."""
        self.launches.append((kernel, grid, threads))

    def block(self, instructions: list, lanes) -> None:
        """A basic block that `lanes` run."""
        warps = np.unique(lanes >> 5).size
        counted = sum(not i.opcode.startswith("mov.") for i in instructions)
        self.instructions[self.launches[-1][0]] += 32 * warps * counted

    def memory(self, site, lanes, name: str, offset, size: int) -> None:
        """One access to global memory by `lanes`, `size` bytes each, at offsets in the tensor `name`."""
        way = "write" if site.opcode.startswith("st") else "read"
        traffic = self.memory_traffic[self.launches[-1][0], way, name]
        warp = (lanes >> 5) << 40
        sectors = np.unique(warp | offset // SECTOR)
        bytes_of_warp = np.unique(warp | offset)  # accesses are aligned: two either meet whole or not at all
        warps, counts = np.unique(bytes_of_warp >> 40, return_counts=True)
        traffic.sectors += sectors.size
        traffic.ideal += int((-(-counts * size // SECTOR)).sum())
        traffic.bytes += bytes_of_warp.size * size
        traffic.touched.append(np.unique(sectors & (1 << 40) - 1))

    def shared(self, site, lanes, address, size: int) -> None:
        """One access to shared memory by `lanes`, `size` bytes each."""
        traffic = self.shared_traffic[self.launches[-1][0]]
        words = max(1, size // WORD)
        phase = lanes % 32 * max(size, WORD) // (BANKS * WORD)  # 8 bytes: half warps; 16: quarters
        group = (lanes >> 5) * 4 + phase
        word = (address // WORD)[:, None] + np.arange(words)
        group = np.broadcast_to(group[:, None], word.shape)
        distinct = np.unique(group.astype(np.int64) << 32 | word)
        bank = (distinct >> 32) * BANKS + (distinct & 0xFFFFFFFF) % BANKS
        groups, depth = np.unique(bank, return_counts=True)
        worst = np.zeros(int(groups.max()) // BANKS + 1, np.int64)
        np.maximum.at(worst, groups // BANKS, depth)
        traffic.sectors += int(worst.sum())
        per_group = np.unique(distinct >> 32, return_counts=True)[1]
        traffic.ideal += int((-(-per_group // BANKS)).sum())
        traffic.bytes += distinct.size * WORD

    def total(self, way: str) -> int:
        """Bytes of all sectors that kernels read or wrote."""
        return SECTOR * sum(t.sectors for (_, w, _), t in self.memory_traffic.items() if w == way)
