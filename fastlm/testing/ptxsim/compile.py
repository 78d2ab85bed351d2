"""Program -> Python: each basic block becomes one function over numpy arrays, a number per thread.

A register is one array (or an array of one number, where all threads have the same). Its canonical type is
unsigned of its width; inside a block it keeps the type that it was last written with, and is viewed as what
the next instruction reads.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import arithmetic, matrix
from .errors import UnknownInstruction
from .flow import ranks
from .forms import form_of
from .parse import Block, Instruction, Operand, Program

_CANONICAL = {"pred": "p", "b8": "u2", "b16": "u2", "b32": "u4", "b64": "u8"}  # a byte: low in 16 bits
_CACHE = r"(?:\.L1::(?:evict_first|evict_last|no_allocate)|\.L2::cache_hint|\.L2::(?:64|128|256)B)*"
_LOAD = re.compile(rf"ld\.(global(?:\.nc)?|shared(?:::cta)?){_CACHE}(?:\.v([248]))?\.([bsuf])(8|16|32|64)$")
# Without a space the address is generic: here it must be of global memory, where both are the same number.
_STORE = re.compile(rf"st(?:\.(global|shared(?:::cta)?))?{_CACHE}(?:\.v([248]))?\.([bsuf])(8|16|32|64)$")
_PARAM = re.compile(r"ld\.param(?:\.v([24]))?\.([bsuf])(8|16|32|64)$")
_SHUFFLE = re.compile(r"shfl\.sync\.(bfly|idx|up|down)\.b32$")
_REDUX = re.compile(r"redux\.sync\.(?=(?:add|min|max)\.[su]|(?:and|or|xor)\.b)(\w+)\.([sub])32$")
_COMPARE = re.compile(r"setp\.(\w+)\.(f16|bf16)x2$")
_COPY = re.compile(r"cp\.async\.(ca|cg)\.shared\.global(?:\.L2::(?:64|128|256)B)?$")
_NOTHING = ("createpolicy.fractional.L2::evict_first.b64", "createpolicy.fractional.L2::evict_last.b64",
            "griddepcontrol.launch_dependents")  # fmt: skip


@dataclass
class Compiled:
    """functions: one per basic block; each returns (target, fall-through, predicate), -1 being the end."""

    program: Program
    functions: list
    sites: list[Instruction]
    ranks: list[int]  # of each block, in the order in which waiting threads run
    cell: int  # bytes of the smallest piece of shared memory that the kernel accesses
    source: str


def compile_program(program: Program) -> Compiled:
    """Refuses the whole kernel if there is one instruction that is not known."""
    uses = Counter()
    for block in program.blocks:
        uses.update({r for i in block.instructions for r in _registers_of(i)})
    namespace = dict(vars(arithmetic))
    sites: list[Instruction] = []
    products = [
        i for block in program.blocks for i in block.instructions if i.opcode.startswith("wgmma.mma_async")
    ]
    accumulators = {o.value for i in products for o in i.operands[0].value}
    fragments = {o.value for i in products if i.operands[1].kind == "vector" for o in i.operands[1].value}
    numbers = range(len(program.blocks))
    writers = [_Block(program, n, uses, namespace, sites, accumulators, fragments) for n in numbers]
    source = "\n".join(w.source() for w in writers)
    exec(compile(source, f"<ptx {program.name}>", "exec"), namespace)
    functions = [namespace[f"block{n}"] for n in range(len(writers))]
    return Compiled(program, functions, sites, ranks(program), _cell(sites), source)


def _cell(sites: list[Instruction]) -> int:
    sizes = [16]
    for site in sites:
        if match := _LOAD.match(site.opcode) or _STORE.match(site.opcode):
            if (match.group(1) or "global").startswith("shared"):
                sizes.append(int(match.group(4)) // 8)
        elif site.opcode.startswith("cp.async.ca"):
            sizes.append(4)
    return min(sizes)


def _registers_of(instruction: Instruction):
    def walk(operand: Operand):
        if operand.kind in ("reg", "not"):
            yield operand.value
        elif operand.kind in ("vector", "pair"):
            for part in operand.value:
                yield from walk(part)
        elif operand.kind == "address":
            yield from walk(operand.value)

    if instruction.guard:
        yield instruction.guard.register
    for operand in instruction.operands:
        yield from walk(operand)


class _Block:
    """Writes one basic block's function."""

    def __init__(
        self,
        program: Program,
        number: int,
        uses: Counter,
        namespace: dict,
        sites: list,
        accumulators: set,
        fragments: set,
    ):
        self.program, self.number, self.uses = program, number, uses
        self.namespace, self.sites = namespace, sites
        self.accumulators, self.fragments = accumulators, fragments
        self.lines: list[str] = []
        self.types: dict[str, str] = {}  # what each register's variable holds now
        self.written: set[str] = set()
        self.reads: list[str] = []
        self.end: str | None = None
        self.accumulating = False  # such a read is no use of what a wgmma still writes
        block: Block = program.blocks[number]
        for instruction in block.instructions:
            self._instruction(instruction)

    def source(self) -> str:
        head = [f"def block{self.number}(R, M):"]
        head += [f"    {_variable(r)} = R.get({r!r}, {self._canonical(r)!r})" for r in self.reads]
        self.accumulating = True
        kept = [r for r in sorted(self.written) if self.uses[r] > 1]
        tail = [f"    R.put({r!r}, {self._as(r, self._canonical(r))})" for r in kept]
        end = self.end or f"return {self.number + 1}, None, None"
        return "\n".join(head + [f"    {line}" for line in self.lines] + tail + [f"    {end}"]) + "\n"

    # Operands

    def _canonical(self, register: str) -> str:
        return _CANONICAL[self.program.registers[register]]

    def _load(self, register: str) -> None:
        if register not in self.types:
            self.types[register] = self._canonical(register)
            self.reads.append(register)

    def _as(self, register: str, t: str) -> str:
        self._load(register)
        if register in self.accumulators and not self.accumulating:
            self.lines.append(f"M.matrix.settled({len(self.sites) - 1}, {register!r})")
        have, name = self.types[register], _variable(register)
        if have == t or t == "p":
            return name
        if have[1] == t[1]:
            return f"{name}.view({t.upper()})"
        if t[1] < have[1]:  # a narrow operand in a wide register: its low bits
            return f"{self._as(register, 'u' + have[1])}.astype(U{t[1]}).view({t.upper()})"
        raise UnknownInstruction(f"a register of {have[1]} bytes read as {t[1]}: {self.sites[-1].text}")

    def _constant(self, value: np.ndarray) -> str:
        name = f"K{len(self.namespace)}"
        self.namespace[name] = value
        return name

    def _read(self, operand: Operand, t: str) -> str:
        if operand.kind == "reg":
            return self._as(operand.value, t)
        if operand.kind == "not":
            return f"~{self._as(operand.value, 'p')}"
        if operand.kind == "immediate":
            return self._constant(immediate(operand.value, t))
        if operand.kind == "special":
            return f"M.special({operand.value!r}).view({t.upper()})"
        if operand.kind == "symbol" and operand.value in self.program.params:  # its place in .param space
            return self._constant(np.array([self.program.params[operand.value][0]], f"u{t[1]}").view(t))
        if operand.kind == "symbol" and operand.value in self.program.shared:
            return self._constant(np.array([self.program.shared[operand.value]], f"u{t[1]}").view(t))
        raise UnknownInstruction(f"operand {operand.value!r}: {self.sites[-1].text}")

    def _old(self, register: str) -> str:
        """What a guarded instruction leaves; a register that nothing has written yet holds 0."""
        return self._as(register, self._canonical(register))

    def _write(self, operand: Operand, t: str, expression: str, guard: str | None = None) -> None:
        if operand.value == "_":
            self.lines.append(expression)
            return
        if operand.kind != "reg":
            raise UnknownInstruction(f"writes to {operand.kind}: {self.sites[-1].text}")
        register, kept = operand.value, self._canonical(operand.value)
        if kept[1:] > t[1:] and t != "p":  # a result wider in its register: bits above are the sign's or 0
            wide = f"{'i' if t[0] == 'i' else 'u'}{kept[1]}"
            source = expression if t[0] in "iu" else f"({expression}).view(U{t[1]})"
            expression, t = f"({source}).astype({wide.upper()})", wide
        if guard:
            view = "" if t in ("p", kept) else f".view({kept.upper()})"
            expression, t = f"np.where({guard}, ({expression}){view}, {self._old(register)})", kept
        self.lines.append(f"{_variable(register)} = {expression}")
        if register in self.accumulators | self.fragments and not self.accumulating:
            self.lines.append(f"M.matrix.touched.add({register!r})")
        self.types[register] = t
        self.written.add(register)

    def _guard(self, instruction: Instruction) -> str | None:
        if instruction.guard is None:
            return None
        name = self._as(instruction.guard.register, "p")
        return f"(~{name})" if instruction.guard.negated else name

    def _address(self, operand: Operand) -> str:
        base, width = operand.value, 8
        if base.kind == "reg":
            width = int(self._canonical(base.value)[1])
        elif base.kind == "symbol":
            width = 4
        name = self._read(base, f"u{width}")
        return f"{name}.astype(I8) + {operand.offset}" if operand.offset else f"{name}.astype(I8)"

    # Instructions

    def _instruction(self, i: Instruction) -> None:
        self.sites.append(i)
        if i.opcode in _NOTHING:
            for operand in i.operands[:1]:
                if operand.kind == "reg":
                    self._write(operand, "u8", self._constant(np.zeros(1, np.uint64)))
            return
        if i.opcode in ("mov.b32", "mov.b64") and any(o.kind == "vector" for o in i.operands[:2]):
            self._repack(i)
        elif form := form_of(i.opcode, len(i.operands)):
            self._arithmetic(i, form)
        elif not (
            self._compare_halves(i) or self._memory(i) or self._control(i) or self._warp(i) or self._matrix(i)
        ):
            raise UnknownInstruction(f"line {i.line}: {i.text}")

    def _arithmetic(self, i: Instruction, form) -> None:
        count = len(form.results)
        pairs = zip(i.operands[count:], form.operands, strict=True)
        expression = form.expression.format(*(self._read(o, t) for o, t in pairs))
        self._write(i.operands[0], form.results[0], expression, self._guard(i))

    def _compare_halves(self, i: Instruction) -> bool:
        """setp.f16x2 and .bf16x2: a predicate of the lower halves, and one of the upper."""
        match = _COMPARE.match(i.opcode)
        form = match and form_of(f"setp.{match.group(1)}.{match.group(2)}", 3)
        if not form or i.guard or i.operands[0].kind != "pair":
            return False
        self.lines.append(f"a, b = halves({self._read(i.operands[1], 'u4')})")
        self.lines.append(f"c, d = halves({self._read(i.operands[2], 'u4')})")
        view = ".view(F2)" if match.group(2) == "f16" else ""
        for to, left, right in zip(i.operands[0].value, "ab", "cd", strict=True):
            if to.value != "_":
                self._write(to, "p", form.expression.format(left + view, right + view))
        return True

    def _repack(self, i: Instruction) -> None:
        to, source = i.operands
        wide = i.opcode == "mov.b64"
        whole, part, split, join = (
            ("u8", "u4", "words", "joined_words") if wide else ("u4", "u2", "halves", "joined")
        )
        if to.kind == "vector":
            if len(to.value) == 4 and not wide and not i.guard:
                for n, operand in enumerate(to.value):
                    byte = f"({self._read(source, 'u4')} >> U4({8 * n}) & U4(255)).astype(U2)"
                    self._write(operand, "u2", byte)
                return
            if len(to.value) != 2 or i.guard:
                raise UnknownInstruction(f"line {i.line}: {i.text}")
            self.lines.append(f"low, high_ = {split}({self._read(source, whole)})")
            for operand, name in zip(to.value, ("low", "high_"), strict=True):
                if operand.value != "_":
                    self._write(operand, part, name)
        else:
            if len(source.value) != 2:
                raise UnknownInstruction(f"line {i.line}: {i.text}")
            parts = ", ".join(self._read(o, part) for o in source.value)
            self._write(to, whole, f"{join}({parts})", self._guard(i))

    def _memory(self, i: Instruction) -> bool:
        site, guard = len(self.sites) - 1, self._guard(i)
        if match := _PARAM.match(i.opcode):
            self._parameter(i, match)
        elif match := _LOAD.match(i.opcode):
            space, count, kind, bits = (
                match.group(1)[:6],
                int(match.group(2) or 1),
                match.group(3),
                match.group(4),
            )
            unit, targets = int(bits) // 8, _parts(i.operands[0])
            old = ", ".join(self._old(o.value) if guard and o.value != "_" else "None" for o in targets)
            address = self._address(i.operands[1])
            self.lines.append(
                f"loaded = M.load({site}, {space!r}, {address}, {unit}, {count}, {guard}, ({old},))"
            )
            for n, operand in enumerate(targets):
                if operand.value != "_":
                    t = f"{'i' if kind == 's' else 'u'}{unit}"
                    wide = guard and self._canonical(operand.value)
                    self._write(
                        operand,
                        wide or t,
                        f"loaded[{n}]" if wide or kind != "s" else f"loaded[{n}].view({t.upper()})",
                    )
        elif match := _STORE.match(i.opcode):
            space, unit = (match.group(1) or "global")[:6], int(match.group(4)) // 8
            values = ", ".join(self._read(o, f"u{unit}") for o in _parts(i.operands[1]))
            self.lines.append(
                f"M.store({site}, {space!r}, {self._address(i.operands[0])}, {unit}, ({values},), {guard})"
            )
        elif _COPY.match(i.opcode):
            to, source, size = i.operands[:3]
            given = self._read(i.operands[3], "u4") if len(i.operands) > 3 else None
            to, source, size = self._address(to), self._address(source), int(size.value, 0)
            self.lines.append(f"M.copy({site}, {to}, {source}, {size}, {given}, {guard})")
        elif i.opcode in ("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all") and not guard:
            left = int(i.operands[0].value, 0) if i.operands else 0
            call = {"commit_group": "M.commit()", "wait_group": f"M.wait({left})", "wait_all": "M.wait(None)"}
            self.lines.append(call[i.opcode.rsplit(".", 1)[1]])
        else:
            return False
        return True

    def _parameter(self, i: Instruction, match) -> None:
        count, kind, unit = int(match.group(1) or 1), match.group(2), int(match.group(3)) // 8
        base, offset = self._read(i.operands[1].value, "u8"), i.operands[1].offset
        t = f"{'i' if kind == 's' else 'u'}{unit}"
        for n, operand in enumerate(_parts(i.operands[0])[:count]):
            place = f"{base}, {offset + n * unit}"
            self._write(operand, t, f"M.parameter({place}, {t.upper()})", self._guard(i))

    def _control(self, i: Instruction) -> bool:
        root = i.opcode.split(".")[0]
        if i.opcode in ("bra", "bra.uni"):
            target = self.program.labels[i.operands[0].value]
        elif i.opcode in ("ret", "exit"):
            target = -1
        elif (
            i.opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned")
            and not i.guard
            and len(i.operands) == 1
        ):
            self.lines.append(f"M.barrier({len(self.sites) - 1})")
            return True
        elif i.opcode == "bar.warp.sync" and not i.guard:
            self.lines.append(f"M.warp_barrier({len(self.sites) - 1})")
            return True
        elif root == "trap":
            self.end = f"M.trap({len(self.sites) - 1})"
            return True
        else:
            return False
        guard = self._guard(i)
        self.end = f"return {target}, {self.number + 1}, {guard}" if guard else f"return {target}, None, None"
        return True

    def _warp(self, i: Instruction) -> bool:
        site = len(self.sites) - 1
        if i.guard:
            return False
        if match := _SHUFFLE.match(i.opcode):
            to, source, lane, clamp, members = i.operands
            call = (
                f"M.shuffle({site}, {match.group(1)!r}, {self._read(source, 'u4')}, {self._read(lane, 'u4')},"
            )
            call += f" {self._read(clamp, 'u4')}, {self._read(members, 'u4')})"
            self.lines.append(f"shuffled, inside = {call}")
            value, flag = to.value if to.kind == "pair" else (to, None)
            self._write(value, "u4", "shuffled")
            if flag is not None:
                self._write(flag, "p", "inside")
            return True
        if i.opcode == "elect.sync":
            _, flag = i.operands[0].value
            self._write(flag, "p", f"M.elect({site}, {self._read(i.operands[1], 'u4')})")
            return True
        if match := _REDUX.match(i.opcode):
            name, t = match.group(1), f"{'i' if match.group(2) == 's' else 'u'}4"
            value, members = self._read(i.operands[1], t), self._read(i.operands[2], "u4")
            self._write(i.operands[0], t, f"M.reduce({site}, {name!r}, {value}, {members})")
            return True
        if i.opcode in ("vote.sync.any.pred", "vote.sync.all.pred", "vote.sync.ballot.b32"):
            kind = i.opcode.split(".")[2]
            t = "u4" if kind == "ballot" else "p"
            self._write(i.operands[0], t, f"M.vote({site}, {kind!r}, {self._read(i.operands[1], 'p')})")
            return True
        return False

    def _matrix(self, i: Instruction) -> bool:
        site = len(self.sites) - 1
        if i.guard:
            return False
        if i.opcode in ("wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned"):
            waits = i.operands and int(i.operands[0].value)
            self.lines.append(f"M.matrix.wait({waits})" if i.operands else "M.matrix.commit()")
            return True
        if i.opcode == "wgmma.fence.sync.aligned":
            self.lines.append("M.matrix.fence()")
            return True
        if i.opcode.startswith("fence.proxy.async"):
            self.lines.append("M.fence_proxy()")
            return True
        if (found := matrix.form(i.opcode)) is None:
            return False
        method, options = found
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        if method == "store":
            address, values = self._address(i.operands[0]), self._vector(i.operands[1])
            self.lines.append(f"M.matrix.store({site}, {address}, {values}{given})")
            return True
        if method in ("load", "load_bytes"):
            arguments = self._address(i.operands[1])
        elif method == "mma":
            arguments = ", ".join(self._vector(o) for o in i.operands[1:4])
        else:
            arguments = self._wgmma(i.operands)
        self.lines.append(f"made = M.matrix.{method}({site}, {arguments}{given})")
        self.accumulating = method == "wgmma"
        for n, operand in enumerate(_parts(i.operands[0])):
            self._write(operand, "u4", f"made[{n}]")
        self.accumulating = False
        return True

    def _vector(self, operand: Operand, t: str = "u4") -> str:
        return "[" + ", ".join(self._read(o, t) for o in _parts(operand)) + "]"

    def _wgmma(self, operands: list[Operand]) -> str:
        d, a, b, scale, *rest = operands
        names = [[o.value for o in d.value], [o.value for o in _parts(a) if a.kind == "vector"]]
        self.accumulating = True
        old, scale = self._vector(d), self._read(scale, "p")
        self.accumulating = False
        left = self._vector(a, "u4" if a.kind == "vector" else "u8")
        signs, transposed = [int(o.value) for o in rest[:2]], [o.value == "1" for o in rest[2:4]]
        transposed = [False] * (2 - len(transposed)) + transposed  # of an a in registers nothing is said
        return f"{left}, {self._read(b, 'u8')}, {old}, {scale}, {names!r}, {signs or [1, 1]}, {transposed}"


def immediate(text: str, t: str) -> np.ndarray:
    """A literal as an array of one number of type t."""
    if text[:2] in ("0f", "0F"):
        return np.array([int(text[2:], 16)], np.uint32).view("f4" if t == "f4" else "u4")
    if text[:2] in ("0d", "0D"):
        return np.array([int(text[2:], 16)], np.uint64).view("f8" if t == "f8" else "u8")
    number = int(text.rstrip("U"), 0)
    if t == "p":
        return np.array([bool(number)])
    if t[0] == "f":  # a bit pattern, as 0xFF80 of a half
        return np.array([number & (1 << 8 * int(t[1])) - 1], f"u{t[1]}").view(t)
    return np.array([number & (1 << 8 * int(t[1])) - 1], f"u{t[1]}").view(t)


@functools.cache
def _variable(register: str) -> str:
    return re.sub(r"\W", "_", register.replace("%", "v_").replace("@", "__"))


def _parts(operand: Operand) -> list[Operand]:
    return operand.value if operand.kind == "vector" else [operand]
