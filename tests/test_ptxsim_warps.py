"""ptxsim's instructions between the lanes of a warp, against the PTX ISA's own pseudo-code."""

import functools
import operator
import struct

import pytest
import torch

from fastlm.testing.ptxsim import SimulationError, UnknownInstruction, run

HEAD = """.version 8.7
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 x, .param .u64 y, .param .u32 b)
{
.reg .pred %p<8>; .reg .b32 %r<16>; .reg .b64 %d<8>;
mov.u32 %r0, %tid.x; mul.wide.u32 %d0, %r0, 4;
ld.param.u64 %d1, [x]; add.s64 %d1, %d1, %d0; ld.global.b32 %r1, [%d1];
ld.param.u64 %d2, [y]; add.s64 %d2, %d2, %d0; ld.param.u32 %r2, [b];
"""
TAIL = "\nst.global.b32 [%d2], %r3; ret;\n}"


def execute(body, x, b=0):
    """y, one number a thread."""
    y = torch.zeros_like(x)
    run(HEAD + body + TAIL, (1, 1, 1), (x.numel(), 1, 1), [x, y, struct.pack("<i", b)])
    return y


def shuffled(mode, lane, b, c):
    """Section "Data Movement and Conversion Instructions: shfl.sync": (source lane, predicate)."""
    bval, cval, segmask = b & 31, c & 31, c >> 8 & 31
    most, least = lane & segmask | cval & ~segmask, lane & segmask
    if mode == "up":
        j, inside = lane - bval, lane - bval >= most
    elif mode == "down":
        j, inside = lane + bval, lane + bval <= most
    elif mode == "bfly":
        j, inside = lane ^ bval, lane ^ bval <= most
    else:
        j = least | bval & ~segmask
        inside = j <= most
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("segments", [0, 0x1800, 0x1000])
def test_shuffles_take_the_lane_that_the_isa_computes(mode, segments):
    clamp = segments | (0 if mode == "up" else 31)
    x = torch.arange(64, dtype=torch.int32) * 10
    for b in (0, 1, 3, 7, 16, 31, 33):
        body = f"shfl.sync.{mode}.b32 %r3|%p1, %r1, %r2, {clamp}, -1;"
        expected = [shuffled(mode, lane, b, clamp) for lane in range(32)]
        from_lanes = torch.tensor([w * 32 + j for w in range(2) for j, _ in expected])
        assert torch.equal(execute(body, x, b), x[from_lanes])
        inside = torch.tensor([i for _, i in expected] * 2, dtype=torch.int32)
        assert torch.equal(execute(body + "selp.b32 %r3, 1, 0, %p1;", x, b), inside)


REDUCTIONS = {
    "add.s32": operator.add,
    "add.u32": operator.add,
    "min.s32": min,
    "max.s32": max,
    "min.u32": lambda a, b: min(a, b, key=lambda v: v % 2**32),
    "max.u32": lambda a, b: max(a, b, key=lambda v: v % 2**32),
    "and.b32": operator.and_,
    "or.b32": operator.or_,
    "xor.b32": operator.xor,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_redux_reduces_over_its_warp(name):
    x = torch.randint(-(2**31), 2**31 - 1, (64,)).to(torch.int32)
    y = execute(f"redux.sync.{name} %r3, %r1, -1;", x)
    for lanes in (slice(0, 32), slice(32, 64)):
        expected = functools.reduce(REDUCTIONS[name], x[lanes].tolist())
        assert ((y[lanes].to(torch.int64) - expected) % 2**32 == 0).all()


@pytest.mark.parametrize(("kind", "expected"), [("any", (1, 0)), ("all", (0, 0)), ("ballot", (0x14, 0))])
def test_votes_are_of_the_warp(kind, expected):
    x = torch.zeros(64, dtype=torch.int32)
    x[2] = x[4] = 1
    out = "%r3" if kind == "ballot" else "%p2"
    body = (
        f"setp.ne.b32 %p1, %r1, 0; vote.sync.{kind}.{'b32' if kind == 'ballot' else 'pred'} {out}, %p1, -1;"
    )
    body += "" if kind == "ballot" else "selp.b32 %r3, 1, 0, %p2;"
    assert execute(body, x).tolist() == [expected[0]] * 32 + [expected[1]] * 32


def test_elect_is_true_in_one_lane_of_each_warp():
    y = execute("elect.sync %r4|%p1, -1; selp.b32 %r3, 1, 0, %p1;", torch.zeros(64, dtype=torch.int32))
    assert y.reshape(2, 32).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    "instruction", ["redux.sync.add.s32 %r3, %r1, -1;", "shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;"]
)
def test_lanes_that_are_not_there_are_found(instruction):
    body = f"mov.u32 %r3, 0; setp.lt.u32 %p1, %r0, 16; @%p1 bra $L; bra $M;\n$L:\n{instruction}\n$M:\n"
    with pytest.raises(SimulationError, match="divergence"):
        execute(body, torch.zeros(32, dtype=torch.int32))


@pytest.mark.parametrize("opcode", ["redux.sync.min.f32", "redux.sync.add.b32", "match.any.sync.b32"])
def test_what_nobody_wrote_is_refused(opcode):
    with pytest.raises(UnknownInstruction, match=opcode):
        execute(f"{opcode} %r3, %r1, -1;", torch.zeros(32, dtype=torch.int32))
