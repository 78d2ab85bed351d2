"""PTX text -> Program: instructions with parsed operands, cut into basic blocks.

Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/, chapters 4 and 5.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import UnknownInstruction


class Operand(NamedTuple):
    """kind: reg, not (a negated predicate), special, symbol, immediate, vector, address or pair (d|p)."""

    kind: str
    value: object
    offset: int = 0


class Guard(NamedTuple):
    """@p or @!p."""

    register: str
    negated: bool


@dataclass
class Instruction:
    """One line: its full form, operands and guard."""

    opcode: str
    operands: list[Operand]
    guard: Guard | None
    line: int
    text: str


@dataclass
class Block:
    """Instructions that are entered at the first one only; control leaves after the last."""

    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Program:
    """One kernel. Registers are named as in the text, those of an inner scope with its number behind."""

    name: str
    params: dict[str, tuple[int, int]]  # name -> (offset, bytes) in the packed arguments
    registers: dict[str, str]  # name -> pred, b16, b32, b64
    blocks: list[Block]
    labels: dict[str, int]  # -> index of a block
    shared: dict[str, int]  # symbol -> offset
    static_shared: int  # bytes
    constants: dict[str, bytes]  # module-level .global and .const arrays
    threads: tuple[int, ...] | None  # .reqntid or .maxntid


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_ENDS = ("bra", "ret", "exit", "trap")
_LABEL = re.compile(r"([$\w]+):(?!:)\s*")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)


def parse(text: str, name: str | None = None) -> Program:
    """The kernel `name`, or the only one there is."""
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
    text = re.sub(r"(?m)^\s*\.(loc|file)\b[^\n]*$", "", text)
    entries = [m for m in re.finditer(r"\.entry\s+([$\w]+)\s*(\()?", text) if name in (None, m.group(1))]
    if len(entries) != 1:
        raise ValueError(f"ptxsim: wanted one kernel{f' {name}' if name else ''}, found {len(entries)}")
    entry = entries[0]
    params, at = _params(text, entry.end()) if entry.group(2) else ({}, entry.end())
    start = text.index("{", at)
    end = _closing(text, start)
    threads = re.search(r"\.(?:req|max)ntid\s+([\d, ]+)", text[at:start])
    parser = _Body(text, start + 1, end)
    constants = _constants(text[: entry.start()])
    shared, size = _shared(text[: entry.start()] + parser.declarations)
    blocks, labels = _blocks(parser.items)
    wanted = tuple(int(n) for n in threads.group(1).split(",")) if threads else None
    return Program(entry.group(1), params, parser.registers, blocks, labels, shared, size, constants, wanted)


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError("ptxsim: a kernel's body does not end")


def _params(text: str, start: int) -> tuple[dict, int]:
    end = text.index(")", start)
    params, offset = {}, 0
    for declared in filter(None, (p.strip() for p in text[start:end].split(","))):
        align = re.search(r"\.align\s+(\d+)\s+\.b8", declared)
        match = re.search(r"([$\w]+)(?:\[(\d+)\])?$", declared)
        unit = _SIZES[re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)", declared).group(1)]
        size = unit * int(match.group(2) or 1)
        to = int(align.group(1)) if align else unit
        offset = -(-offset // to) * to
        params[match.group(1)] = (offset, size)
        offset += size
    return params, end + 1


def _constants(text: str) -> dict[str, bytes]:
    found = {}
    for match in re.finditer(r"\.(?:global|const)\s[^;]*?\.b8\s+([$\w]+)\[\d+\]\s*=\s*\{([^}]*)\}", text):
        found[match.group(1)] = bytes(int(n) for n in match.group(2).split(","))
    return found


def _shared(text: str) -> tuple[dict[str, int], int]:
    offset, found = 0, {}
    pattern = r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s+([$\w]+)(?:\[(\d*)\])?"
    declared = sorted(
        re.findall(pattern, text), key=lambda d: bool(d[0])
    )  # dynamic memory lies behind the rest
    for _, align, unit, name, count in declared:
        to = int(align or _SIZES[unit])
        offset = -(-offset // to) * to
        found[name] = offset
        offset += _SIZES[unit] * int(count or (0 if count == "" else 1))
    return found, offset


class _Body:
    """Statements of a body in their order: labels (str) and instructions; scopes rename their registers."""

    def __init__(self, text: str, at: int, end: int):
        self.registers: dict[str, str] = {}
        self.items: list[str | Instruction] = []
        self.declarations = ""
        self._scopes: list[dict[str, str]] = [{}]
        self._count = 0
        self._lines = [m.start() for m in re.finditer("\n", text)]
        self._seen: dict[str, Operand] = {}  # operands outside inner scopes
        skip = re.compile(r"\s*")
        while (at := skip.match(text, at).end()) < end:
            at = self._statement(text, at, end)

    def _statement(self, text: str, at: int, end: int) -> int:
        if text[at] == "{":
            self._count += 1
            self._scopes.append({})
            return at + 1
        if text[at] == "}":
            self._scopes.pop()
            return at + 1
        if label := _LABEL.match(text, at, end):
            self.items.append(label.group(1))
            return label.end()
        stop = text.index(";", at)
        self._line(text[at:stop].strip(), bisect_right(self._lines, at) + 1)
        return stop + 1

    def _line(self, statement: str, line: int) -> None:
        if registers := _REGISTERS.match(statement):
            self._declare(*registers.groups())
        elif statement.startswith(".shared"):
            self.declarations += statement + ";"
        elif statement and not statement.startswith(".pragma"):
            self.items.append(self._instruction(statement, line))

    def _declare(self, kind: str, names: str) -> None:
        kind = "pred" if kind == "pred" else "b" + kind[1:]
        inner = f"@{self._count}" if len(self._scopes) > 1 else ""
        for name in (n.strip() for n in names.split(",")):
            counted = re.match(r"(.*)<(\d+)>", name)
            every = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]
            for n in every:
                self._scopes[-1][n] = n + inner
                self.registers[n + inner] = kind

    def _instruction(self, statement: str, line: int) -> Instruction:
        guard, text = None, " ".join(statement.split())
        match = re.match(r"@(!?)\s*([%$\w.]+)\s+(.*)", text)
        rest = text
        if match:
            guard, rest = Guard(self._resolve(match.group(2)), bool(match.group(1))), match.group(3)
        opcode, _, operands = rest.partition(" ")
        return Instruction(opcode, [self._operand(o) for o in _split(operands)], guard, line, text)

    def _resolve(self, name: str) -> str | None:
        return next((s[name] for s in reversed(self._scopes) if name in s), None)

    def _operand(self, text: str) -> Operand:
        if len(self._scopes) > 1:
            return self._parsed(text)
        if text not in self._seen:
            self._seen[text] = self._parsed(text)
        return self._seen[text]

    def _parsed(self, text: str) -> Operand:
        if text[0] == "{":
            return Operand("vector", [self._operand(o) for o in _split(text[1:-1])])
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            return Operand("address", self._operand(base.strip()), int(offset.strip() or "0", 0))
        if "|" in text:
            return Operand("pair", [self._operand(o.strip()) for o in text.split("|")])
        if text[0] == "!":
            return Operand("not", self._resolve(text[1:].strip()))
        if (register := self._resolve(text)) is not None:
            return Operand("reg", register)
        if text[0] == "%":
            return Operand("special", text[1:])
        if text[0].isdigit() or text[0] == "-":
            return Operand("immediate", text)
        return Operand("symbol", text)


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [p for p in (*parts, text[start:].strip()) if p]


def _blocks(items: list) -> tuple[list[Block], dict[str, int]]:
    blocks, labels = [Block()], {}
    for item in items:
        if isinstance(item, str):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[item] = len(blocks) - 1
            continue
        root = item.opcode.split(".")[0]
        if root in ("call", "brx", "callseq"):
            raise UnknownInstruction(f"line {item.line}: {item.text}")
        blocks[-1].instructions.append(item)
        if root in _ENDS:
            blocks.append(Block())
    return blocks, labels
