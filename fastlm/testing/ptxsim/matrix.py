"""The matrix instructions of a running batch: between its registers, its shared memory and tensor_cores.py.

wgmma runs when it is issued, and counts as running until a wait: until then its accumulators may not be
touched, and the shared memory that it reads may not be written to. Its registers need a wgmma.fence since
their last use by another instruction, and there must be one before the first. Source: PTX ISA, wgmma.fence.
"""

import re

import numpy as np

from . import tensor_cores

_MMA = re.compile(
    r"mma\.sync\.aligned\.(m\d+n\d+k\d+)\.row\.col(\.satfinite)?\.(f32|f16|s32)\.(f16|bf16|tf32|s8|u8)"
    r"\.(?:f16|bf16|tf32|s8|u8)\.\3$"
)
_LDMATRIX = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16$")
_LDMATRIX_B8 = re.compile(r"ldmatrix\.sync\.aligned\.m16n16\.x([12])\.trans\.shared(?:::cta)?\.b8$")
_STMATRIX = re.compile(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16$")
_WGMMA = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(f32|f16|s32)\.(f16|bf16|tf32|s8|u8)\.(?:f16|bf16|tf32|s8|u8)$"
)


def form(opcode: str) -> tuple[str, dict] | None:
    """(method of Matrix, its options) of an instruction that runs here, or None."""
    if match := _MMA.match(opcode):
        shape, satfinite, total, kind = match.groups()
        return "mma", {"shape": shape, "kind": kind, "total": total, "satfinite": bool(satfinite)}
    if match := _LDMATRIX.match(opcode):
        return "load", {"count": int(match.group(1)), "trans": bool(match.group(2))}
    if match := _LDMATRIX_B8.match(opcode):
        return "load_bytes", {"count": int(match.group(1))}
    if match := _STMATRIX.match(opcode):
        return "store", {"count": int(match.group(1)), "trans": bool(match.group(2))}
    if match := _WGMMA.match(opcode):
        n, k, total, kind = match.groups()
        return "wgmma", {"n": int(n), "k": int(k), "total": total, "kind": kind}
    return None


class Matrix:
    """What the machine's compiled code calls for matrix instructions."""

    def __init__(self, machine):
        self._machine = machine
        self.running: list[tuple] = []  # wgmma groups: (number of the group, registers, cells)
        self._groups = 0
        self.fenced = False
        self.touched: set[str] = set()  # wgmma's registers that other instructions used since the last fence

    def _registers(self, values) -> np.ndarray:
        filled = np.empty((len(values), self._machine.lanes.size), np.uint32)
        for n, value in enumerate(values):  # three times as fast as np.stack of np.broadcast_to
            filled[n] = value
        return filled.reshape(len(values), -1, 32)

    def mma(self, site, a, b, c, shape, kind, total, satfinite) -> list[np.ndarray]:
        """mma.sync: registers of a, b, c -> those of d."""
        self._machine.together(site)
        a, b, c = (self._registers(r) for r in (a, b, c))
        numbers = {"f32": np.float32, "s32": np.int32, "f16": np.uint32}[total]
        d = tensor_cores.mma(shape, kind, a, b, c.view(numbers), satfinite)
        return list(np.ascontiguousarray(d).view(np.uint32).reshape(d.shape[0], -1))

    def load(self, site, address, count, trans) -> list[np.ndarray]:
        """ldmatrix of 8 x 8 numbers of 16 bits."""
        values = self._rows(site, address, count, 8).view(np.uint16)
        registers = tensor_cores.ldmatrix_fragments(values, trans)
        return list(registers.reshape(count, -1))

    def load_bytes(self, site, address, count) -> list[np.ndarray]:
        """ldmatrix of 16 x 16 bytes, transposed."""
        registers = tensor_cores.ldmatrix_bytes(self._rows(site, address, count, 16).view(np.uint8))
        return list(registers.reshape(2 * count, -1))

    def _rows(self, site, address, count: int, height: int) -> np.ndarray:
        """The matrices' rows, uint64 [W, count, height, 2]: read by the lanes that give them, for others."""
        machine = self._machine
        machine.together(site)
        lanes = machine.of_all(address).reshape(-1, 32)
        rows = tensor_cores.ldmatrix_rows(lanes, count, height)
        which = np.arange(machine.lanes.size).reshape(-1, 32)[:, : height * count].reshape(-1)
        words = machine.read_shared(site, rows.reshape(-1), 8, 2, which)
        first = which % height * 32 // height  # row r of 8: to lanes 4 r to 4 r + 3
        machine.hand_on(site, rows.reshape(-1), 16, which & ~31 | first)
        return np.ascontiguousarray(words).reshape(*rows.shape, 2)

    def store(self, site, address, values, count, trans) -> None:
        """stmatrix: the same way back."""
        machine = self._machine
        machine.together(site)
        rows = tensor_cores.stmatrix_rows(self._registers(values), trans)
        lanes = machine.of_all(address).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        which = np.arange(machine.lanes.size).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        words = np.ascontiguousarray(rows).view(np.uint64).reshape(-1, 2)
        machine.write_shared(site, lanes, 8, words, which)

    def wgmma(self, site, a, b, d, scale_d, names, signs, transposed, n, k, total, kind) -> list[np.ndarray]:
        """wgmma.mma_async: a is four registers or a descriptor, b a descriptor.

        names: the accumulators', and those of a's registers. signs: of a and b, 1 or -1. transposed: whether
        a and b lie with their outer dimension contiguous.
        """
        machine = self._machine
        machine.together(site)
        if machine.lanes.size % 128 or (machine.lanes[::128] % 128).any():
            machine.fail("divergence", site, 0, "warps of this warpgroup are elsewhere")
        if not self.fenced or not self.touched.isdisjoint(names[0] + names[1]):
            machine.fail("async", site, 0, "there is no wgmma.fence since another use of its registers")
        cells: list[tuple] = []
        if len(a) == 4:
            words = self._registers(a).reshape(4, -1, 128)
            left = tensor_cores.wgmma_a_fragment(words, kind)
        else:
            left = self._operand(site, a[0], 64, k, kind, transposed[0], cells)
        right = self._operand(site, b, n, k, kind, transposed[1], cells)
        numbers = {"f32": np.float32, "s32": np.int32, "f16": np.uint32}[total]
        old = self._registers(d).reshape(len(d), -1, 128)
        keep = machine.of_all(scale_d)[::128]
        new = tensor_cores.wgmma(left * signs[0], right * signs[1], old.view(numbers), keep)
        self.running.append([None, names[0], cells])
        return list(np.ascontiguousarray(new).view(np.uint32).reshape(len(d), -1))

    def _operand(self, site, descriptor, rows, k, kind, transposed, cells) -> np.ndarray:
        machine = self._machine
        bits = tensor_cores.KINDS[kind].bits
        words = machine.of_all(descriptor)[::128]
        address = tensor_cores.wgmma_operand(words, rows, k, bits.itemsize, transposed)
        groups = np.repeat(np.arange(0, machine.lanes.size, 128), rows * k)
        flat, touched = machine.read_by_proxy(site, address.reshape(-1), bits.itemsize, groups)
        cells.append((touched, machine.block[groups]))
        values = machine.shared.view(bits.itemsize)[flat // bits.itemsize].view(bits)
        return tensor_cores.widen(values.reshape(address.shape), kind)

    def commit(self) -> None:
        """wgmma.commit_group."""
        self._groups += 1
        for entry in self.running:
            if entry[0] is None:
                entry[0] = self._groups

    def wait(self, left: int) -> None:
        """wgmma.wait_group: all but the last `left` groups are done."""
        last = self._groups - left
        done = [e for e in self.running if e[0] is not None and e[0] <= last]
        self.running = [e for e in self.running if e[0] is None or e[0] > last]
        for _, _, cells in done:
            for touched, blocks in cells:
                self._machine.shared.released(touched, self._machine.epoch[blocks])

    def fence(self) -> None:
        """wgmma.fence."""
        self.fenced = True
        self.touched.clear()

    def settled(self, site, register) -> None:
        """Refuses an accumulator that a wgmma is still writing, and notes that it is read."""
        self.touched.add(register)
        if any(register in names for _, names, _ in self.running):
            self._machine.fail("async", site, 0, f"{register} is still written by a wgmma")
