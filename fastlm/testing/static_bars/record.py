"""What the kernels that calls launch are compiled to."""

import functools
from typing import NamedTuple

import torch

from ... import ops
from ..cases import cases_of
from . import compiled, cuda
from .calls import Call
from .compiled import Compiled
from .occupancy import occupancy
from .sass import Instruction, disassembled, jump_table, loops, machine_code, registers_and_stack

MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # matrix products of halves and TF32: of a warp, four warps, a block
COPIES = ("LDGSTS", "UTMALDG")  # from global to shared memory, while the thread goes on
_SPILLS = ("STL", "LDL")
_ATOMICS = ("RED", "REDG", "ATOM", "ATOMG")  # in global memory
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class Kernel(NamedTuple):
    """One compiled kernel. spills: instructions that move spilled registers. occupancy: in percent.

    shared: bytes of a block. loads, stores: bits of the widest global access. wide: of the bytes of all
    global accesses, each counted once, those of 128 bits and more, in percent. matrix, copies: what stands in
    the innermost loops that multiply matrices; bare: how many of these have no copy to shared memory;
    hot_spills: the spills in them, or where no loop multiplies, in any loop.
    """

    registers: int
    spills: int
    hot_spills: int
    stack: int
    shared: int
    threads: int
    blocks: int
    occupancy: int
    limit: str
    loads: int
    stores: int
    wide: int
    atomics: int
    matrix: str
    copies: str
    bare: int


def measured(arch: int, calls: list[Call], backend: str = "triton") -> dict[str, Kernel]:
    """The kernels that the calls launch, by "op case dtype kernel sm_<arch>"."""
    named, launched = {}, (cuda if backend == "cuda" else compiled).launched
    for call in calls:
        for name, kernel in launched(arch, functools.partial(_run, call, backend)):
            named[f"{call} {name} sm_{arch}"] = kernel
    return dict(zip(named, described(arch, list(named.values())), strict=True))


def _run(call: Call, backend: str) -> None:
    inputs = call.inputs(call.dtype)
    wanted = [inputs[name] for name in cases_of(call.op)[1] if inputs.get(name) is not None]
    wanted = [t.requires_grad_() for t in wanted]
    made = getattr(ops, call.op)(**inputs, backend=backend)
    outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if t is not None and t.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, wanted, [torch.empty_like(t) for t in outputs])


def described(arch: int, kernels: list[Compiled]) -> list[Kernel]:
    """What each is."""
    codes = {(k.name, k.cubin): machine_code(k.cubin, k.name) for k in kernels}
    instructions = dict(zip(codes, disassembled(arch, list(codes.values())), strict=True))
    return [_described(arch, k, instructions[k.name, k.cubin]) for k in kernels]


def _described(arch: int, kernel: Compiled, code: list[Instruction]) -> Kernel:
    registers, stack = registers_and_stack(kernel.cubin)[kernel.name]
    held = occupancy(arch, registers, kernel.shared, kernel.threads)
    reads = [_width(i) for i in code if i.root in ("LDG", "LDGSTS", "LD")]
    writes = [_width(i) for i in code if i.root in ("STG", "ST")]
    moved = sum(reads + writes)
    wide = sum(width for width in reads + writes if width >= 128)
    return Kernel(
        registers=registers,
        spills=sum(i.root in _SPILLS for i in code),
        stack=stack,
        shared=kernel.shared,
        threads=kernel.threads,
        blocks=held.blocks,
        occupancy=round(100 * held.share),
        limit=held.limit,
        loads=max(reads, default=0),
        stores=max(writes, default=0),
        wide=100 * wide // moved if moved else 100,
        atomics=sum(i.root in _ATOMICS for i in code),
        **_main_loops(code, jump_table(kernel.cubin, kernel.name)),
    )


def _width(access: Instruction) -> int:
    return next((_WIDTHS[part] for part in access.opcode.split(".") if part in _WIDTHS), 32)


def _main_loops(code: list[Instruction], table: tuple[int, ...]) -> dict:
    found, roots = loops(code, table), {i.address: i.root for i in code}
    main = []
    for instruction in code:
        if instruction.root in MATRIX:
            innermost = next((loop for loop in found if instruction.address in loop), None)
            if innermost is not None and innermost not in main:
                main.append(innermost)
    inside = [{roots[address] for address in loop} for loop in main]
    every = set().union(*inside)
    hot = set().union(*(main or found))
    return {
        "hot_spills": sum(i.root in _SPILLS and i.address in hot for i in code),
        "matrix": " ".join(root for root in MATRIX if root in every),
        "copies": " ".join(root for root in COPIES if root in every),
        "bare": sum(not roots_of_loop & set(COPIES) for roots_of_loop in inside),
    }
