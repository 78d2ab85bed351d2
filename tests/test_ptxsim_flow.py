"""What nvcc's PTX does and Triton's does not: sides of a branch behind their join, parameters by address."""

import struct

import pytest
import torch

from fastlm.testing.ptxsim import run
from fastlm.testing.ptxsim.flow import ranks
from fastlm.testing.ptxsim.parse import parse

HEAD = """.version 8.7
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 y, .param .align 8 .b8 s[16])
{
.reg .pred %p<8>; .reg .b32 %r<16>; .reg .b64 %d<8>;
mov.u32 %r0, %tid.x; mul.wide.u32 %d0, %r0, 4;
ld.param.u64 %d2, [y]; add.s64 %d2, %d2, %d0;
"""
STORE = "shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; st.global.b32 [%d2], %r3; ret;"
SIDE_BEHIND_THE_JOIN = f"""
setp.lt.u32 %p1, %r0, 7;
@%p1 bra SIDE;
mov.b32 %r1, 1;
JOIN: {STORE}
SIDE: mov.b32 %r1, 2;
bra JOIN;
"""
BODY_BEHIND_THE_EXIT = f"""
mov.b32 %r1, 0;
HEAD: setp.lt.u32 %p1, %r1, %r0;
@%p1 bra BODY;
{STORE}
BODY: add.s32 %r1, %r1, 1;
bra HEAD;
"""
EXIT_BEHIND_THE_BODY = f"""
mov.b32 %r1, 0;
HEAD: setp.ge.u32 %p1, %r1, %r0;
@%p1 bra DONE;
add.s32 %r1, %r1, 1;
bra HEAD;
DONE: {STORE}
"""


def executed(body):
    y = torch.zeros(32, dtype=torch.int32)
    run(HEAD + body + "\n}", (1, 1, 1), (32, 1, 1), [y, struct.pack("<4i", 10, 11, 12, 13)])
    return y.tolist()


def test_threads_wait_at_a_join_for_a_side_that_comes_after_it():
    """shfl.sync: "wait until all non-exited threads corresponding to membermask have executed" it."""
    side = [2 if i < 7 else 1 for i in range(32)]
    assert executed(SIDE_BEHIND_THE_JOIN) == [side[i ^ 1] for i in range(32)]


@pytest.mark.parametrize("body", [BODY_BEHIND_THE_EXIT, EXIT_BEHIND_THE_BODY])
def test_threads_wait_behind_a_loop_for_those_that_go_round_again(body):
    assert executed(body) == [i ^ 1 for i in range(32)]


def test_an_inner_loop_ends_before_what_follows_it_in_the_outer_one():
    body = """
OUTER: add.s32 %r2, %r2, 1;
INNER: add.s32 %r1, %r1, 1;
setp.lt.u32 %p1, %r1, %r0;
@%p1 bra INNER;
setp.lt.u32 %p2, %r2, 3;
@%p2 bra OUTER;
ret;
}"""
    assert ranks(parse(HEAD + body)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("unreachable", ["", "LOST: add.s32 %r1, %r1, 1; bra END;"])
def test_every_block_has_a_rank(unreachable):
    body = f"mov.b32 %r1, 0; bra END; {unreachable} END: ret;\n}}"
    found = ranks(parse(HEAD + body))
    assert sorted(found) == list(range(len(found)))


def test_a_parameter_is_read_by_its_address():
    """mov: "get the address of a variable"; ld.param takes a register and an offset."""
    assert executed("mov.b64 %d3, s; ld.param.u32 %r3, [%d3+8]; st.global.b32 [%d2], %r3; ret;") == [12] * 32


def test_threads_may_read_different_parameters():
    body = """
and.b32 %r4, %r0, 3; mul.wide.u32 %d4, %r4, 4; mov.b64 %d3, s; add.s64 %d3, %d3, %d4;
ld.param.s32 %r3, [%d3]; st.global.b32 [%d2], %r3; ret;"""
    assert executed(body) == [10, 11, 12, 13] * 8
