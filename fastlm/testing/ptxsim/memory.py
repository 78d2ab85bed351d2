"""Global and shared memory of a simulated launch, with everything that a GPU does not check.

Global memory is the CPU tensors' own, at its real addresses: an access must lie inside one known allocation.
Shared memory carries a tag per cell (the smallest piece that the kernel accesses) for its last writer and
its last reader: thread, epoch (barriers of the block so far) and the warp's own epoch. From these come poison
(never written), races (two threads, one epoch, one of them writing) and asynchronous copies used too early.
"""

from bisect import bisect_right

import numpy as np

from .errors import SimulationError

_UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_EPOCH, _WARP_EPOCH = 24, 16  # a tag: epoch << 24 | warp's epoch << 16 | many flags | thread
_THREAD, _SAME_WARP, _MANY = 0x7FF, 1 << 11, 1 << 12  # _MANY: readers of several warps
_IN_FLIGHT = 1 << 60
_NEVER = -1
_BLOCK = 40  # a tag of global memory: block + 1 << 40 | tag
_ACCOUNTED = 1 << 24  # bytes of an allocation whose writers are known


class Allocations:
    """The memory that a launch may touch: [start, end) of each tensor's storage."""

    def __init__(self):
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._bytes: list[np.ndarray] = []
        self._writers: dict[int, np.ndarray] = {}
        self.names: list[str] = []

    def add(self, name: str, start: int, data: np.ndarray) -> None:
        """data: uint8, the memory itself, whose address is `start`."""
        at = bisect_right(self._starts, start)
        if at and self._starts[at - 1] == start and self._ends[at - 1] >= start + data.size:
            return
        self._starts.insert(at, start)
        self._ends.insert(at, start + data.size)
        self._bytes.insert(at, data)
        self.names.insert(at, name)

    def pieces(self, address: np.ndarray, size: int):
        """Yields (which addresses, or None for all; allocation; offsets), or (which, None, None) outside."""
        at = bisect_right(self._starts, int(address.min())) - 1
        if at >= 0 and int(address.max()) + size <= self._ends[at]:
            yield None, at, address - self._starts[at]
            return
        found = np.searchsorted(np.asarray(self._starts, np.int64), address, side="right") - 1
        ends = np.asarray(self._ends, np.int64)[found]
        outside = (found < 0) | (address + size > ends)
        if outside.any():
            yield np.flatnonzero(outside), None, None
            return
        for at in np.unique(found):
            which = np.flatnonzero(found == at)
            yield which, int(at), address[which] - self._starts[at]

    def writers(self, at: int, make: bool) -> np.ndarray | None:
        """Who wrote each byte of an allocation in this launch: (block + 1) << 40 | tag, 0 where nobody did.

        make: where nobody has written to it yet, too. None where it is too large to keep account of.
        """
        if make and at not in self._writers and self._bytes[at].size <= _ACCOUNTED:
            self._writers[at] = np.zeros(self._bytes[at].size, np.int64)
        return self._writers.get(at)

    def view(self, at: int, unit: int) -> np.ndarray:
        """An allocation as numbers of `unit` bytes, as many as there are whole."""
        data = self._bytes[at]
        return data[: data.size // unit * unit].view(_UNITS[unit])


class Shared:
    """Shared memory of `blocks` blocks, `size` bytes each, in cells of `cell` bytes."""

    def __init__(self, blocks: int, size: int, cell: int):
        self.size, self.cell = size, cell
        self.pitch = -(-max(size, 1) // 1024) * 1024
        self.data = np.zeros(blocks * self.pitch, np.uint8)
        self._writer = np.full(self.data.size // cell, _NEVER, np.int64)
        self._reader = np.full(self.data.size // cell, _NEVER, np.int64)
        self._by_proxy = np.zeros(self.data.size // cell, np.int16)  # wgmmas that read a cell now
        self._unfenced = np.zeros(self.data.size // cell, bool)  # written with no fence.proxy.async since

    def cells(self, flat: np.ndarray, size: int) -> np.ndarray:
        """Numbers of the cells of accesses of `size` bytes at flat offsets: [lanes, size / cell]."""
        first = flat // self.cell
        count = size // self.cell
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)

    def read(self, cells: np.ndarray, tags: np.ndarray) -> tuple[str, np.ndarray] | None:
        """Notes a read; returns (kind, lanes) of what is wrong with it, or None."""
        tags = tags[:, None]
        writer = self._writer[cells]
        if writer.min() < 0:
            return "poison", np.flatnonzero((writer < 0).any(1))
        if writer.max() >= _IN_FLIGHT:
            return "async", np.flatnonzero((writer >= _IN_FLIGHT).any(1))
        if (wrong := _conflicts(writer, tags)) is not None:
            return "race", wrong
        self._note_reader(cells, tags)
        return None

    def read_by_proxy(self, cells: np.ndarray, tags: np.ndarray) -> tuple[str, np.ndarray] | None:
        """Notes a read by wgmma, which lasts until released(); returns what is wrong with it."""
        if self._unfenced[cells].any():
            return "proxy", np.flatnonzero(self._unfenced[cells].any(1))
        if (wrong := self.read(cells, tags)) is not None:
            return wrong
        self._by_proxy[np.unique(cells)] += 1
        return None

    def released(self, cells: np.ndarray, epochs: np.ndarray) -> None:
        """A wgmma that read these has been waited for, by each warp for itself, in these epochs of its block.

        So it counts as a read by several warps: who writes here needs a barrier behind the wait.
        """
        self._by_proxy[np.unique(cells)] -= 1
        self._reader[cells] = (epochs << _EPOCH | _MANY)[:, None]

    def fence(self, blocks: np.ndarray) -> None:
        """fence.proxy.async of these blocks' threads."""
        self._of_blocks(self._unfenced)[blocks] = False

    def unfenced(self, blocks: np.ndarray) -> np.ndarray:
        """Which of these blocks' cells were written with no fence.proxy.async since: [blocks, cells]."""
        return self._of_blocks(self._unfenced)[blocks]

    def _of_blocks(self, cells: np.ndarray) -> np.ndarray:
        return cells.reshape(-1, self.pitch // self.cell)

    def _note_reader(self, cells, tags) -> None:
        before = self._reader[cells]
        self._reader[cells] = tags
        after = self._reader[cells]
        differs = np.where(after != tags, after, before)  # another reader of this cell, now or before
        differs ^= tags
        told = differs & (-1 << _EPOCH | _THREAD | _SAME_WARP | _MANY)
        shared = np.flatnonzero((told > 0) & (told < 1 << _EPOCH))  # in one epoch, by more than one thread
        if shared.size:
            one_warp = differs.ravel()[shared] & (_THREAD & ~31 | _MANY) == 0
            cells = cells.ravel()[shared]
            self._reader[cells] = tags.ravel()[shared // before.shape[1]] | _SAME_WARP
            self._reader[cells[~one_warp]] |= _MANY

    def write(self, cells: np.ndarray, tags: np.ndarray, in_flight: bool) -> tuple[str, np.ndarray] | None:
        """Notes a write, to be done now or by an asynchronous copy; returns what is wrong with it."""
        tags = tags[:, None]
        writer, reader = self._writer[cells], self._reader[cells]
        if writer.max() >= _IN_FLIGHT:
            return "async", np.flatnonzero((writer >= _IN_FLIGHT).any(1))
        if (running := self._by_proxy[cells] > 0).any():
            return "async", np.flatnonzero(running.any(1))
        self._unfenced[cells] = True
        for before in (writer, reader):
            if (wrong := _conflicts(before, tags)) is not None:
                return "race", wrong
        self._writer[cells] = tags | _IN_FLIGHT if in_flight else tags
        return None

    def arrive(self, cells: np.ndarray, tags: np.ndarray) -> None:
        """An asynchronous copy has come in, as a write of the thread that waited for it."""
        self._writer[cells] = tags[:, None]

    def view(self, unit: int) -> np.ndarray:
        """All blocks' memory as numbers of `unit` bytes."""
        return self.data.view(_UNITS[unit])


def _conflicts(before: np.ndarray, tags: np.ndarray) -> np.ndarray | None:
    """Lanes whose access meets one of another thread with nothing between them, or None."""
    same = before >> _EPOCH == tags >> _EPOCH
    if not same.any():
        return None
    other = (before ^ tags) & _THREAD != 0
    other |= before & (_SAME_WARP | _MANY) != 0
    one_warp = ((before & _THREAD) >> 5 == (tags & _THREAD) >> 5) & (before & _MANY == 0)
    ordered = one_warp & ((before ^ tags) >> _WARP_EPOCH & 0xFF != 0)  # a barrier of the warp lies between
    wrong = same & other & ~ordered
    return np.flatnonzero(wrong.any(1)) if wrong.any() else None


def unordered(before: np.ndarray, tags: np.ndarray) -> np.ndarray:
    """Where nothing orders two accesses of global memory: blocks, or threads with no barrier between."""
    differs = before ^ tags
    other_warp = differs & _THREAD >= 32
    other_lane = (differs & _THREAD != 0) & (differs >> _WARP_EPOCH & 0xFF == 0)
    return (before != 0) & ((differs >> _BLOCK != 0) | (differs >> _EPOCH == 0) & (other_warp | other_lane))


def aligned(address: np.ndarray, size: int) -> np.ndarray | None:
    """Lanes whose address is not a multiple of size, or None."""
    wrong = address & (size - 1)
    return np.flatnonzero(wrong) if wrong.any() else None


def raise_finding(kind: str, where: str) -> None:
    """Raises the finding."""
    raise SimulationError(kind, where)
