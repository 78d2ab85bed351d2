"""Machine code of a kernel, read: its instructions, and the loops that they lie in.

Source of the instructions' names: CUDA Binary Utilities, "Instruction Set Reference".
"""

import functools
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_PROCESSORS = {80: "SM80", 90: "SM90a", 100: "SM100a", 120: "SM120a"}
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
_JUMPS = ("BRA", "CALL")  # CALL.REL goes to a division's rare path, or leaves a loop
_ENDS = ("EXIT", "RET", "KILL")
_SWITCHES = ("BRX", "BRXU")  # to an address of the kernel's table


class Instruction(NamedTuple):
    """opcode: with its modifiers, as "LDG.E.128". always: no predicate decides whether it runs."""

    address: int
    opcode: str
    operands: str
    always: bool

    @property
    def root(self) -> str:
        """The opcode alone."""
        return self.opcode.partition(".")[0]


def machine_code(cubin: bytes, kernel: str) -> bytes:
    """A kernel's section .text of a cubin."""
    offset, size = _section(cubin, f".text.{kernel}") or (0, 0)
    if not size:
        raise ValueError(f"machine_code: this cubin has no kernel {kernel}")
    return cubin[offset : offset + size]


def static_shared(cubin: bytes, kernel: str) -> int:
    """Bytes of shared memory that a kernel declares; from sm_90 on with the driver's, if it uses any."""
    return (_section(cubin, f".nv.shared.{kernel}") or (0, 0))[1]


def jump_table(cubin: bytes, kernel: str) -> tuple[int, ...]:
    """Addresses that a kernel's switches go to; () where it has none."""
    offset, size = _section(cubin, f".nv.constant2.{kernel}") or (0, 0)
    return struct.unpack_from(f"<{size // 4}I", cubin, offset)


def _section(cubin: bytes, name: str) -> tuple[int, int] | None:
    """(where it starts, its size) in an ELF file."""
    (sections,), (size, count, names_at) = (
        struct.unpack_from("<Q", cubin, 0x28),
        struct.unpack_from("<3H", cubin, 0x3A),
    )
    headers = [struct.unpack_from("<2I4Q2I2Q", cubin, sections + i * size) for i in range(count)]
    names, wanted = headers[names_at][4], name.encode() + b"\0"
    return next((h[4:6] for h in headers if cubin.startswith(wanted, names + h[0])), None)


@functools.lru_cache(maxsize=16)
def registers_and_stack(cubin: bytes) -> dict[str, tuple[int, int]]:
    """Of each kernel (registers of a thread, bytes of its stack); spilled registers lie in the stack."""
    told = _run(triton.knobs.nvidia.cuobjdump.path, cubin, "-res-usage")
    return {name: (int(registers), int(stack)) for name, registers, stack in _USAGE.findall(told)}


def disassembled(arch: int, codes: list[bytes]) -> list[list[Instruction]]:
    """The instructions of each kernel; one process for all, as its start takes longer than its work."""
    told = _run(triton.knobs.nvidia.nvdisasm.path, b"".join(codes), "-b", _PROCESSORS[arch])
    found, code, start = [[] for _ in codes], 0, 0
    for line in _LINE.finditer(told):
        address, predicate, opcode, operands = line.groups()
        while int(address, 16) >= start + len(codes[code]):
            start += len(codes[code])
            code += 1
        if opcode.startswith(_JUMPS):
            operands = _TARGET.sub(lambda m, start=start: f"{int(m[1], 16) - start:#x}", operands)
        found[code].append(Instruction(int(address, 16) - start, opcode, operands.strip(), not predicate))
    if sum(map(len, found)) * 16 != sum(map(len, codes)):
        raise ValueError("disassembled: nvdisasm wrote instructions that are not understood here")
    return found


def _run(tool: str, content: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        file.write_bytes(content)
        return subprocess.run([tool, *options, str(file)], capture_output=True, text=True, check=True).stdout


def loops(code: list[Instruction], table: tuple[int, ...] = ()) -> list[set[int]]:
    """Addresses of the instructions of each natural loop, smaller loops first. table: jump_table().

    A branch back to a block that every path to the branch goes through makes a loop of what lies between.
    Source: Aho, Lam, Sethi, Ullman, "Compilers", section 9.6.
    """
    starts, follows = _blocks(code, table)
    dominators = _dominators(follows)
    before = [[b for b, after in enumerate(follows) if block in after] for block in range(len(starts))]
    bodies: dict[int, set[int]] = {}
    for block, after in enumerate(follows):
        for head in after:
            if dominators[block] >> head & 1:
                bodies.setdefault(head, {head}).update(_reaching(block, head, before))
    ends = [*starts[1:], len(code)]
    found = [{code[i].address for b in body for i in range(starts[b], ends[b])} for body in bodies.values()]
    return sorted((loop for loop in found if len(loop) > 1), key=len)  # code ends in a branch to itself


def _blocks(code: list[Instruction], table: tuple[int, ...]) -> tuple[list[int], list[list[int]]]:
    """(indices where straight-line blocks start, the blocks that may follow each)."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    leaders = {0}
    for i, instruction in enumerate(code):
        if instruction.root in ("JMX", "JMP") or instruction.root in _SWITCHES and not table:
            raise ValueError(f"loops: where does {instruction.opcode} {instruction.operands} go to?")
        leaders |= {index[address] for address in _targets(instruction, table)}
        if instruction.root in (*_JUMPS, *_ENDS, *_SWITCHES):
            leaders.add(i + 1)
    starts = sorted(i for i in leaders if i < len(code))
    number = {start: block for block, start in enumerate(starts)}
    follows = []
    for block, end in enumerate([*starts[1:], len(code)]):
        last = code[end - 1]
        after = [number[index[address]] for address in _targets(last, table)]
        if _falls_through(last) and block + 1 < len(starts):
            after.append(block + 1)
        follows.append(after)
    return starts, follows


def _targets(instruction: Instruction, table: tuple[int, ...]) -> tuple[int, ...]:
    """Addresses that an instruction may jump to."""
    if instruction.root in _SWITCHES:
        return table
    return (_target(instruction),) if instruction.root in _JUMPS else ()


def _target(branch: Instruction) -> int:
    return int(_TARGET.search(branch.operands)[1], 16)


def _falls_through(last: Instruction) -> bool:
    if last.root == "BRA":  # BRA.DIV, and BRA P0: only some threads may take it
        return not (last.always and last.operands.startswith("0x"))
    return not (last.always and last.root in (*_ENDS, *_SWITCHES))


def _dominators(follows: list[list[int]]) -> list[int]:
    """Of each block, the blocks that every path to it goes through: bits of a number."""
    everything = (1 << len(follows)) - 1
    found = [1, *[everything] * (len(follows) - 1)]
    changed = True
    while changed:
        changed = False
        meets = [everything] * len(follows)
        for block, after in enumerate(follows):
            for next_block in after:
                meets[next_block] &= found[block]
        for block in range(1, len(follows)):
            own = meets[block] | 1 << block
            changed |= own != found[block]
            found[block] = own
    return found


def _reaching(block: int, head: int, before: list[list[int]]) -> set[int]:
    found, left = {head}, [block]
    while left:
        at = left.pop()
        if at not in found:
            found.add(at)
            left += before[at]
    return found
