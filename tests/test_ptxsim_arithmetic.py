"""Each arithmetic form that ptxsim knows, executed as PTX, against ptx_model.py: any NaN equals any other."""

import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
from ptx_model import FORMATS, WIDTH, decode, encode, floating, lop3, model

from fastlm.testing.ptxsim import UnknownInstruction, run
from fastlm.testing.ptxsim.forms import FORMS, THREE, form_of

HEAD = """.version 8.7
.target sm_80
.address_size 64
.visible .entry kernel({params})
{{
.reg .pred %p<99>; .reg .b16 %h<99>; .reg .b32 %r<99>; .reg .b64 %d<99>;
mov.u32 %r90, %tid.x; mov.u32 %r91, %ctaid.x; mad.lo.s32 %r90, %r91, 128, %r90;
"""
BYTES = {"p": 4, **{k + b: int(b) for k in "uif" for b in "1248"}}
TORCH = {2: torch.int16, 4: torch.int32, 8: torch.int64}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def register(t, number):
    return f"%{'p' if t == 'p' else {2: 'h', 4: 'r', 8: 'd'}[BYTES[t]]}{number}"


def place(name, size):
    """Puts the address of this thread's number in %d90."""
    return f"ld.param.u64 %d90, [{name}]; mul.wide.u32 %d91, %r90, {size}; add.s64 %d90, %d90, %d91;"


def execute(opcode, result, operands, cases, immediate=None):
    """The bits that one instruction writes, for every case: a tuple of its operands' bits.

    result, operands: types as in forms.py. immediate: one more operand, a constant.
    """
    count = -(-len(cases) // 128) * 128
    lines, names, tensors = [], [], []
    for i, t in enumerate(operands):
        bits = [c[i] for c in cases] + [cases[0][i]] * (count - len(cases))
        tensors.append(torch.from_numpy(np.array(bits, UNSIGNED[BYTES[t]])).view(TORCH[BYTES[t]]))
        names.append(register(t, i))
        to = f"%r{80 + i}" if t == "p" else names[-1]
        lines.append(f"{place(f'a{i}', BYTES[t])} ld.global.b{8 * BYTES[t]} {to}, [%d90];")
        if t == "p":
            lines.append(f"setp.ne.b32 {names[-1]}, {to}, 0;")
    names += [] if immediate is None else [str(immediate)]
    lines.append(f"{opcode} {', '.join([register(result, 50), *names])};")
    if result == "p":
        lines.append("selp.b32 %r50, 1, 0, %p50;")
    out = "%r50" if result == "p" else register(result, 50)
    lines.append(f"{place('y', BYTES[result])} st.global.b{8 * BYTES[result]} [%d90], {out}; ret;\n}}")
    params = ", ".join(f".param .u64 {n}" for n in ["y", *(f"a{i}" for i in range(len(operands)))])
    y = torch.zeros(count, dtype=TORCH[BYTES[result]])
    run(HEAD.format(params=params) + "\n".join(lines), (count // 128, 1, 1), (128, 1, 1), [y, *tensors])
    return y.numpy().view(UNSIGNED[BYTES[result]])[: len(cases)].tolist()


# What to try

INTEGERS = {
    w: [
        0,
        1,
        2,
        7,
        (1 << w - 1) - 1,
        1 << w - 1,
        (1 << w - 1) + 1,
        (1 << w) - 2,
        (1 << w) - 1,
        0xB5 << w - 11,
    ]
    for w in (16, 32, 64)
}
SHIFTS = [0, 1, 8, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 1 << 31, (1 << 32) - 1]
SELECTORS = [0x3210, 0x7654, 0x0123, 0x5410, 0x7632, 0x3340, 0x9991, 0xFEDC, 0xBA98, 0x12340000]
NUMBERS = [
    0.0, 1.0, 1.5, 2.5, 0.1, 0.5, 100.7, 2.0**31, 2.0**32, 2.0**63, 2.0**64, 65504.0, 65520.0, 2.0**-24,
    2.0**-25, 2.0**-126, 2.0**-127, 2.0**-149, 3.4028234663852886e38, 2147483520.0, 32767.5, math.inf,
]  # fmt: skip
LARGE = {"f64": [1 + 2**-52, 5e-324, 2.0**-1022, 1.7976931348623157e308]}


def floats(kind):
    """NUMBERS of both signs, the neighbours of 1, two kinds of NaN."""
    bits = [encode(x, kind) for x in NUMBERS + LARGE.get(kind, [])]
    top, one, infinite = 1 << WIDTH[kind] - 1, encode(1.0, kind), encode(math.inf, kind)
    return [*bits, *(b | top for b in bits), one + 1, one - 1, infinite + 1, infinite | top | infinite >> 1]


def patterns(opcode, operands, i):
    """Bit patterns to try as operand i."""
    width, parts = 8 * BYTES[operands[i]], opcode.split(".")
    kinds = [k.removesuffix("x2") for k in parts if k.removesuffix("x2") in FORMATS]
    if operands[i] == "p":
        return [0, 1]
    if parts[0] == "cvt" and parts[-1] not in FORMATS:
        return INTEGERS[width] + [127, 128, 255, 0x4B000001 % (1 << width)]
    if kinds:
        pairs = opcode.endswith("x2")
        kind = next(k for k in reversed(kinds) if WIDTH[k] == (width // 2 if pairs else width))
        found = floats(kind)
        if len(operands) == 3:
            found = found[::5] + found[-2:]
        return [a | b << WIDTH[kind] for a, b in zip(found, found[::-1], strict=True)] if pairs else found
    if (parts[0], i) in (("shl", 1), ("shr", 1), ("shf", 2), ("bfe", 1), ("bfe", 2), ("bfi", 2), ("bfi", 3)):
        return SHIFTS
    return SELECTORS if (parts[0], i) == ("prmt", 2) else INTEGERS[width]


def differences(opcode, form, compute=None, immediate=None):
    """Where the simulator and the model disagree: lines to read."""
    compute = compute or model(opcode)
    operands = form.operands if immediate is None else form.operands[:-1]
    cases = list(itertools.product(*(patterns(opcode, operands, i) for i in range(len(operands)))))
    cases = random.Random(0).sample(cases, min(len(cases), 150 if len(operands) == 3 else 700))
    got = execute(opcode, form.results[0], operands, cases, immediate)
    free = 1 if re.search(r"approx|full", opcode) else 0  # the last bit
    wrong = []
    for case, bits in zip(cases, got, strict=True):
        expected = compute(*case)
        if expected is None or expected != expected and is_nan(opcode, bits):
            continue
        if abs(bits - expected) <= free:
            continue
        shown = "NaN" if expected != expected else f"{expected:#x}"
        wrong.append(f"{opcode} {', '.join(f'{c:#x}' for c in case)}: {bits:#x}, expected {shown}")
    return wrong


def is_nan(opcode, bits):
    """Whether a result is NaN, in either half of a pair."""
    kind = next(k for k in opcode.split(".") if k.removesuffix("x2") in FORMATS or k == "tf32")
    kind, pairs = kind.removesuffix("x2").replace("tf32", "f32"), kind.endswith("x2")
    halves = (bits & (1 << WIDTH[kind]) - 1, bits >> WIDTH[kind]) if pairs else (bits,)
    return any(math.isnan(decode(b, kind)) for b in halves)


FAMILIES = {
    "integers": r"(add|sub|mul|mad|min|max|div|rem|neg|abs)\.(\w+\.)?[us]\d+$",
    "logic, shifts and fields": r"(and|or|xor|not|shl|shr|shf|bfe|bfi|prmt|popc|clz|copysign)\.",
    "moves": r"(cvta|mov|selp)\.",
    "comparisons": r"setp\.",
    "conversions": r"cvt\.",
    "special functions": r".*(approx|full)",
    "floating point": r"(add|sub|mul|fma|min|max|abs|neg|div|rcp|sqrt)\..*f\d+(x2)?(\.b?f16)?$",
}


def family(opcode):
    return next((name for name, pattern in FAMILIES.items() if re.match(pattern, opcode)), None)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_form_computes_what_the_isa_says(name):
    wrong = []
    for opcode, form in FORMS.items():
        if family(opcode) == name:
            wrong += differences(opcode, form)[:3]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:60])


def test_every_form_is_tested():
    assert [o for o in FORMS if not (family(o) and model(o))] == ["lop3.b32"]


@pytest.mark.parametrize("table", [0x00, 0xFF, 0xF0, 0xCC, 0xAA, 0x80, 0xFE, 0x96, 0xE8, 0x1B])
def test_lop3_looks_up_each_bit(table):
    assert not differences("lop3.b32", FORMS["lop3.b32"], lop3(table), table)


@pytest.mark.parametrize("opcode", THREE)
def test_three_operands_are_two_and_then_the_third(opcode):
    both = floating(opcode)

    def third(a, b, c):
        first = both(a, b)
        return both(0x7FFFFFFF if first != first else first, c)

    assert not differences(opcode, THREE[opcode], third)


REFUSED = ["add.sat.f32", "mul.rz.f32", "shf.l.clamp.b32", "setp.lt.b32", "max.NaN.ftz.f32", "add.rz.ftz.f32"]


@pytest.mark.parametrize("opcode", REFUSED)
def test_a_form_that_nobody_wrote_is_refused(opcode):
    assert form_of(opcode, 3) is None
    with pytest.raises(UnknownInstruction, match=re.escape(opcode)):
        execute(opcode, "u4", ["u4", "u4"], [(0, 0)])


def test_the_model_encodes_what_it_decodes():
    for kind in ("f16", "bf16"):
        for bits in range(0, 1 << 16, 3):
            x = decode(bits, kind)
            assert x != x or encode(x, kind) == bits


def test_mov_gives_the_bytes_of_a_register_the_lowest_first():
    """Section "Data Movement and Conversion Instructions: mov": a.x = d & 0xff, a.y = (d >> 8) & 0xff ..."""
    x, y = torch.tensor([0x7F80FF01, -2] * 16, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    body = """{ .reg .s8 s<4>; .reg .b32 q<4>;
    ld.param.u64 %d1, [x]; mul.wide.u32 %d2, %r90, 4; add.s64 %d1, %d1, %d2; ld.global.b32 %r1, [%d1];
    mov.b32 {s0, s1, s2, s3}, %r1;
    cvt.s32.s8 q0, s0; cvt.s32.s8 q1, s1; cvt.s32.s8 q2, s2; cvt.s32.s8 q3, s3;
    ld.param.u64 %d3, [y]; mul.wide.u32 %d2, %r90, 16; add.s64 %d3, %d3, %d2;
    st.global.v4.b32 [%d3], {q0, q1, q2, q3}; ret; }\n}"""
    run(HEAD.format(params=".param .u64 x, .param .u64 y") + body, (1, 1, 1), (32, 1, 1), [x, y])
    assert y.tolist() == [1, -1, -128, 127, -2, -1, -1, -1] * 16
