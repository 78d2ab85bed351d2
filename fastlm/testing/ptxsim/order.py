"""What orders a kernel's accesses to memory, as one number: two programs with the same are ordered alike.

Between two accesses lies a window of barriers, landings of copies, ends of wgmmas and fences. Only what a
window leaves behind counts: a commit is nothing by itself, a wait for what has landed neither, and of two
barriers the first orders nothing that the second one does not. When a copy landed counts where what it wrote
is accessed.
"""

import hashlib
from itertools import groupby

import numpy as np

from .machine import Machine
from .matrix import Matrix
from .memory import Shared

_BARRIER, _WARPS, _FENCE, _DONE, _LANDED = "barrier", "warps", "fence", "done", "landed"


class Order:
    """Of all launches that it is told of: shared memory and global memory each by itself, for no access of
    one meets one of the other."""

    def __init__(self):
        self.shared, self.memory = _Accesses(), _Accesses()

    def digest(self) -> str:
        """Of all windows that an access followed."""
        return self.shared.hash.hexdigest() + self.memory.hash.hexdigest()

    def start(self, name: str) -> None:
        """A batch of blocks of a kernel begins; what its last access left open has no effect."""
        for accesses in (self.shared, self.memory):
            accesses.hash.update(name.encode())
            accesses.window, accesses.count = [], 0

    def barrier(self, kind: str, *of: np.ndarray) -> None:
        """Orders accesses of both; of: the blocks, and the warps if it is theirs alone."""
        self.shared.add(kind, *of)
        self.memory.add(kind, *of)


class _Accesses:
    """Of one memory: how many, and a hash of what lies between them."""

    def __init__(self):
        self.hash, self.window, self.count = hashlib.blake2b(digest_size=16), [], 0
        self.landed = np.zeros(
            0, np.int64
        )  # of a cell: when what it holds was copied to it, if asynchronously

    def next(self, cells: np.ndarray | None = None) -> None:
        """An instruction accesses it, or (shared memory) a register that a wgmma uses."""
        if self.window:
            self._close(reduced(self.window))
            self.window = []
        if cells is not None and (landed := self.landed[cells]).any():
            self.hash.update(landed.tobytes())
            self.landed[cells] = 0
        self.count += 1

    def _close(self, window: list[tuple]) -> None:
        if not self.count:  # nothing came before these barriers
            window = [e for e in window if e[0] not in (_BARRIER, _WARPS)]
        later = sum(e[0] != _LANDED for e in window)
        if later:
            self.hash.update(repr((self.count, [e for e in window if e[0] != _LANDED])).encode())
        for event in window:
            if event[0] == _LANDED:
                self.landed[event[1]] = (self.count + 1) << 16 | later
            else:
                later -= 1

    def add(self, kind: str, *of: np.ndarray) -> None:
        """An event; of: the blocks, warps or cells that it is about."""
        self.window.append((kind, *(hashlib.blake2b(a.tobytes(), digest_size=8).hexdigest() for a in of)))

    def land(self, cells: np.ndarray) -> None:
        """A copy has landed in these cells."""
        self.window.append((_LANDED, cells))


def reduced(window: list[tuple]) -> list[tuple]:
    """A window's events without those that a later one repeats; what ends between two others is sorted."""
    kept, barriers, fences = [], set(), set()
    for event in reversed(window):
        kind, where = event[0], event[1]
        if kind in (_BARRIER, _WARPS):
            if where in barriers or event in barriers:
                continue
            barriers.add(where if kind == _BARRIER else event)
            fences.clear()
        elif kind == _FENCE:
            if event in fences:
                continue
            fences.add(event)
        kept.append(event)
    result: list[tuple] = []
    for ends, run in groupby(reversed(kept), lambda e: e[0] == _DONE):
        for event in sorted(run) if ends else run:
            if event[0] == _WARPS and result and result[-1][:2] == (_BARRIER, event[1]):
                continue
            result.append(event)
    return result


class Ordered(Machine):
    """A machine that tells an Order what happens."""

    def __init__(self, order: Order, compiled, grid, threads, shared, arguments, first, blocks, *rest):
        super().__init__(compiled, grid, threads, shared, arguments, first, blocks, *rest)
        self._order = order
        order.start(compiled.program.name)
        self.shared = _Shared(order, blocks, shared, compiled.cell)
        self.matrix = _Matrix(order, self)

    def _pieces(self, *access):
        self._order.memory.next()
        return super()._pieces(*access)

    def barrier(self, site: int) -> None:
        """Of blocks."""
        super().barrier(site)
        self._order.barrier(_BARRIER, np.unique(self.block))

    def warp_barrier(self, site: int) -> None:
        """Of warps."""
        super().warp_barrier(site)
        self._order.barrier(_WARPS, np.unique(self.block), np.unique(self.lanes >> 5))


class _Shared(Shared):
    def __init__(self, order: Order, *sizes):
        super().__init__(*sizes)
        self._order = order
        order.shared.landed = np.zeros(self.data.size // self.cell, np.int64)

    def read(self, cells, tags):
        self._order.shared.next(cells)
        return super().read(cells, tags)

    def write(self, cells, tags, in_flight):
        self._order.shared.next(cells)
        return super().write(cells, tags, in_flight)

    def arrive(self, cells, tags) -> None:
        super().arrive(cells, tags)
        self._order.shared.land(cells)

    def released(self, cells, epochs) -> None:
        super().released(cells, epochs)
        self._order.shared.add(_DONE, cells)

    def fence(self, blocks) -> None:
        if self.unfenced(blocks).any():
            self._order.shared.add(_FENCE, blocks)
        super().fence(blocks)


class _Matrix(Matrix):
    def __init__(self, order: Order, machine: Machine):
        super().__init__(machine)
        self._order = order

    def settled(self, site, register) -> None:
        self._order.shared.next()
        super().settled(site, register)

    def fence(self) -> None:
        if self.touched or not self.fenced:
            self._order.shared.add("registers", np.array(sorted(self.touched)), self._machine.lanes)
        super().fence()
