"""ptxsim finds what a GPU would not forgive, each by a planted bug, and refuses what nobody has written."""

import struct
from contextlib import nullcontext

import pytest
import torch

from fastlm.testing.ptxsim import SimulationError, UnknownInstruction, run
from fastlm.testing.ptxsim.profile import Profile

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 x, .param .u64 y, .param .u32 n)
{
.reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y]; ld.param.u32 %r9, [n];
mov.u32 %r1, %tid.x;
mov.u32 %r2, memory;
shl.b32 %r3, %r1, 2;
add.s32 %r3, %r2, %r3;       // this thread's place in shared memory
xor.b32 %r4, %r1, 33;        // another warp's thread
shl.b32 %r4, %r4, 2;
add.s32 %r4, %r2, %r4;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd4, %rd1, %rd3;    // &x[tid]
add.s64 %rd5, %rd2, %rd3;    // &y[tid]
"""


def execute(body, threads=64, shared=256, n=64, profile=None, order=None):
    """y after the kernel, with x = 0, 1, ..., 63 and y = -1."""
    x, y = torch.arange(64, dtype=torch.int32), torch.full((64,), -1, dtype=torch.int32)
    run(
        HEAD + body + "\nret;\n}",
        (1, 1, 1),
        (threads, 1, 1),
        [x, y, struct.pack("<i", n)],
        shared,
        None,
        profile,
        order,
    )
    return y


EXCHANGE = """
ld.global.b32 %r5, [%rd4];
st.shared.b32 [%r3], %r5;
bar.sync 0;
ld.shared.b32 %r6, [%r4];
st.global.b32 [%rd5], %r6;
"""
COPY = """
cp.async.ca.shared.global [%r3], [%rd4], 4;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
ld.shared.b32 %r6, [%r4];
st.global.b32 [%rd5], %r6;
"""


def found(body, **options):
    with pytest.raises(SimulationError) as error:
        execute(body, **options)
    return error.value


def test_what_is_right_runs():
    swapped = torch.arange(64, dtype=torch.int32) ^ 33
    assert torch.equal(execute(EXCHANGE), swapped)
    assert torch.equal(execute(COPY), swapped)


def test_a_missing_barrier_is_found_even_where_the_result_is_right():
    error = found(EXCHANGE.replace("bar.sync 0;", ""))
    assert error.kind == "race"
    assert "block 0, thread 0" in str(error) and "ld.shared.b32 %r6, [%r4]" in str(error)


def test_a_barrier_of_the_warp_does_not_order_two_warps():
    assert found(EXCHANGE.replace("bar.sync 0;", "bar.warp.sync 0xffffffff;")).kind == "race"


def test_a_barrier_of_the_warp_orders_its_own_threads():
    within = EXCHANGE.replace("bar.sync 0;", "bar.warp.sync 0xffffffff;")
    head = "xor.b32 %r4, %r1, 1; shl.b32 %r4, %r4, 2; add.s32 %r4, %r2, %r4;"
    assert torch.equal(execute(head + within), torch.arange(64, dtype=torch.int32) ^ 1)
    assert found(head + within.replace("bar.warp.sync 0xffffffff;", "")).kind == "race"


def test_a_write_after_a_read_needs_a_barrier():
    again = EXCHANGE + "st.shared.b32 [%r3], %r1;"
    assert found(again).kind == "race"
    execute(EXCHANGE + "bar.sync 0; st.shared.b32 [%r3], %r1;")


def test_two_values_for_one_place_are_a_race_and_one_value_is_not():
    execute("st.shared.b32 [%r2], %r9;")
    assert found("st.shared.b32 [%r2], %r1;").kind == "race"
    assert found("st.global.b32 [%rd2], %r1;").kind == "race"


def test_shared_memory_that_nobody_wrote_is_poison():
    assert found("ld.shared.b32 %r6, [%r3];").kind == "poison"


@pytest.mark.parametrize("gone", ["cp.async.wait_group 0;", "cp.async.commit_group;"])
def test_an_asynchronous_copy_that_nobody_waited_for_is_found(gone):
    assert found(COPY.replace(gone, "")).kind == "async"


def test_a_thread_that_ends_before_its_copies_have_landed_is_found():
    assert found("cp.async.ca.shared.global [%r3], [%rd4], 4;").kind == "async"
    execute("cp.async.ca.shared.global [%r3], [%rd4], 4; cp.async.wait_all;")


def test_a_wait_that_leaves_the_group_running_is_found():
    assert found(COPY.replace("wait_group 0", "wait_group 1")).kind == "async"


def test_a_copy_is_seen_by_other_threads_only_after_a_barrier():
    assert found(COPY.replace("bar.sync 0;", "")).kind == "race"


def test_a_copy_into_what_another_thread_may_still_read_is_found():
    assert found(COPY + "cp.async.ca.shared.global [%r3], [%rd4], 4;").kind == "race"


def test_what_is_not_copied_is_filled_with_zeros():
    y = execute(
        COPY.replace("[%rd4], 4;", "[%rd4], 4, %r5;").replace("cp.async.ca", "mov.u32 %r5, 0; cp.async.ca", 1)
    )
    assert torch.equal(y, torch.zeros(64, dtype=torch.int32))


def test_a_generic_store_writes_to_global_memory():
    assert torch.equal(execute("st.b32 [%rd5], %r1;"), torch.arange(64, dtype=torch.int32))


@pytest.mark.parametrize(
    "body",
    [
        "ld.global.b32 %r5, [%rd4+4];",
        "ld.global.b32 %r5, [%rd1+-4];",
        "st.global.b32 [%rd5+256], %r1;",
        "st.b32 [%rd5+256], %r1;",
        "cvt.u64.u32 %rd6, %r3; st.b32 [%rd6], %r1;",
        "st.shared.b32 [%r3+4], %r1;",
        "cp.async.ca.shared.global [%r3+4], [%rd4], 4;",
        "cp.async.ca.shared.global [%r3], [%rd4+4], 4;",
    ],
)
def test_the_first_byte_outside_is_found(body):
    assert found(body).kind == "bounds"


def test_a_guard_keeps_threads_out():
    execute("setp.lt.u32 %p1, %r1, 63; @%p1 ld.global.b32 %r5, [%rd4+4]; @%p1 st.shared.b32 [%r3+4], %r1;")
    assert found("setp.le.u32 %p1, %r1, 63; @%p1 ld.global.b32 %r5, [%rd4+4];").kind == "bounds"


@pytest.mark.parametrize("body", ["ld.global.b32 %r5, [%rd4+2];", "st.shared.b32 [%r3+2], %r1;"])
def test_a_misaligned_access_is_found(body):
    assert found(body).kind == "alignment"


def test_a_vector_access_is_aligned_to_all_of_it():
    assert found("ld.global.v2.b32 {%r5, %r6}, [%rd4];").kind == "alignment"


def test_a_barrier_that_some_threads_do_not_reach_is_found():
    skip = "setp.eq.u32 %p1, %r1, 5; @%p1 bra DONE; bar.sync 0; DONE: mov.u32 %r5, 0;"
    error = found(skip)
    assert error.kind == "divergence" and "63 of 64 threads" in str(error)


def test_threads_that_have_ended_are_not_waited_for():
    execute("setp.ge.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;")


def test_a_shuffle_among_some_lanes_of_a_warp_is_found():
    shuffle = "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;"
    body = f"setp.eq.u32 %p1, %r1, 5; @%p1 bra DONE; {shuffle} DONE: mov.u32 %r6, 0;"
    assert found(body).kind == "divergence"


@pytest.mark.parametrize(
    ("form", "first", "second"), [("max.s32", 31, 63), ("min.s32", -7, 32), ("max.u32", 2**32 - 7, 63)]
)
def test_redux_reduces_the_values_of_a_warp(form, first, second):
    """PTX ISA: "performs a reduction operation on the data of the 32 bit source register a across all
    non-exited threads in the membermask"; min and max with .s32 or .u32.
    """
    body = "setp.eq.u32 %p1, %r1, 5; mov.b32 %r5, %r1; @%p1 mov.b32 %r5, -7;"
    y = execute(f"{body} redux.sync.{form} %r6, %r5, -1; st.global.b32 [%rd5], %r6;")
    assert (y.view(torch.uint32) if "u32" in form else y).tolist() == [first] * 32 + [second] * 32


def test_threads_meet_again_after_a_branch():
    body = """
    and.b32 %r5, %r1, 1; setp.eq.u32 %p1, %r5, 0; mov.u32 %r6, 0;
    @%p1 bra EVEN;
    add.u32 %r6, %r6, 100;
    EVEN: shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
    st.global.b32 [%rd5], %r7;
    """
    assert execute(body).tolist() == [100, 0] * 32


def test_a_loop_runs_as_often_as_each_thread_asks():
    body = """
    mov.u32 %r5, 0;
    LOOP: add.u32 %r5, %r5, 3; sub.u32 %r1, %r1, 1; setp.gt.s32 %p1, %r1, 0; @%p1 bra LOOP;
    st.global.b32 [%rd5], %r5;
    """
    assert execute(body).tolist() == [3] + [3 * t for t in range(1, 64)]


def test_float64_is_divided_to_the_nearest():
    """div: "div.f64 requires .rnd; .rn: mantissa LSB rounds to nearest even"."""
    body = """
    cvt.rn.f64.u32 %rd6, %r1; mov.u32 %r5, 3; cvt.rn.f64.u32 %rd7, %r5; div.rn.f64 %rd6, %rd6, %rd7;
    shl.b64 %rd6, %rd6, 32; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 %r6, %rd6; st.global.b32 [%rd5], %r6;
    """
    low = [struct.unpack("<i", struct.pack("<d", t / 3)[:4])[0] for t in range(64)]
    assert execute(body).tolist() == low


@pytest.mark.parametrize(("step", "ways"), [(1, 1), (2, 2), (4, 4), (32, 32), (33, 1)])
def test_threads_that_meet_in_a_bank_take_turns(step, ways):
    profile = Profile()
    body = f"mul.lo.u32 %r5, %r1, {4 * step}; add.s32 %r5, %r2, %r5; st.shared.b32 [%r5], %r1;"
    execute(body, threads=32, shared=32 * 4 * step, profile=profile)
    assert profile.shared_traffic["kernel"].ratio == ways


@pytest.mark.parametrize(
    "line",
    [
        "max.f32 %r5, %r1, %r2, %r3, %r4;",
        "sub.f32.f17 %r5, %r1, %r2;",
        "ld.global.volatile.b32 %r5, [%rd4];",
        "frobnicate.b32 %r5, %r1;",
        "atom.global.add.u32 %r5, [%rd4], %r1;",
        "add.sat.s32 %r5, %r1, %r2;",
    ],
)
def test_an_unknown_form_is_refused_by_name(line):
    with pytest.raises(UnknownInstruction) as error:
        execute(line)
    assert line.rstrip(";") in str(error.value)


def test_the_whole_kernel_is_refused_before_any_of_it_runs():
    with pytest.raises(UnknownInstruction):
        execute(
            "st.global.b32 [%rd5], %r1; setp.eq.u32 %p1, %r1, 99; @%p1 bra NO; ret; NO: frob.b32 %r1, %r2;"
        )


def test_a_register_that_nothing_has_set_is_not_zero():
    assert (execute("xor.b32 %r6, %r5, 1; st.global.b32 [%rd5], %r6;") == -2).all()
    some = "setp.lt.u32 %p1, %r1, 9; @%p1 mov.u32 %r5, 3; xor.b32 %r6, %r5, 1; st.global.b32 [%rd5], %r6;"
    assert execute(some).tolist() == [2] * 9 + [-2] * 55


def test_global_memory_has_no_order_between_lanes_without_a_barrier_of_the_warp():
    other = (
        "st.global.b32 [%rd5], %r1; xor.b32 %r4, %r1, 1; mul.wide.u32 %rd3, %r4, 4; add.s64 %rd5, %rd2, %rd3;"
    )
    assert found(other + "ld.global.b32 %r6, [%rd5];").kind == "race"
    assert found(other + "st.global.b32 [%rd5], %r1;").kind == "race"
    execute(other + "bar.warp.sync -1; ld.global.b32 %r6, [%rd5];")
    execute(other + "bar.warp.sync -1; st.global.b32 [%rd5], %r1;")


def test_global_memory_has_no_order_between_blocks_or_warps():
    across = "st.global.b32 [%rd5], %r1; xor.b32 %r4, %r1, 33; mul.wide.u32 %rd3, %r4, 4;"
    across += "add.s64 %rd5, %rd2, %rd3;"
    assert found(across + "ld.global.b32 %r6, [%rd5];").kind == "race"
    assert found(across + "st.global.b32 [%rd5], %r1;").kind == "race"
    execute(across + "bar.sync 0; ld.global.b32 %r6, [%rd5];")
    execute(across + "bar.sync 0; st.global.b32 [%rd5], %r1;")
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for value, race in (("%r9", False), ("%r5", True)):  # one value of all blocks, another one of each
        store = f"mov.u32 %r5, %ctaid.x; st.global.b32 [%rd5], {value};"
        text = HEAD + store + "\nret;\n}"
        with pytest.raises(SimulationError) if race else nullcontext():
            run(text, (2, 1, 1), (64, 1, 1), [x, y, struct.pack("<i", 64)], 256)


PRODUCT = """
.reg .b32 %a<4>, %d<4>;
mov.u32 %r5, 0;
st.shared.b32 [%r3], %r5;
fence.proxy.async.shared::cta;
bar.sync 0;
mov.u64 %rd6, 0;
setp.eq.u32 %p1, %r5, 0;
mov.u32 %a0, 0; mov.u32 %a1, 0; mov.u32 %a2, 0; mov.u32 %a3, 0;
mov.u32 %d0, 0; mov.u32 %d1, 0; mov.u32 %d2, 0; mov.u32 %d3, 0;
wgmma.fence.sync.aligned;
// between
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%d0,%d1,%d2,%d3}, {%a0,%a1,%a2,%a3}, %rd6, %p1, 1, 1, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
add.u32 %r6, %d0, %d3;
"""


def test_wgmma_needs_a_fence_after_other_uses_of_its_registers():
    options = {"threads": 128, "shared": 512}
    head = "and.b32 %r1, %r1, 63; "
    execute(head + PRODUCT, **options)
    assert found(head + PRODUCT.replace("wgmma.fence.sync.aligned;", ""), **options).kind == "async"
    for use in ("mov.u32 %a1, 0;", "mov.u32 %d1, 0;", "mov.u32 %r6, %d1;"):
        assert found(head + PRODUCT.replace("// between", use), **options).kind == "async"
    execute(head + PRODUCT.replace("// between", "mov.u32 %r6, %a1;"), **options)
    assert found(head + PRODUCT.replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"), **options)


def test_what_a_wgmma_has_read_is_written_behind_a_barrier_that_follows_its_wait():
    options = {"threads": 128, "shared": 512}
    write = "st.shared.b32 [%r3], %r5;"
    body = "and.b32 %r1, %r1, 63; " + PRODUCT.replace("wgmma.wait", "bar.sync 0; wgmma.wait")
    assert found(body + write, **options).kind == "race"
    execute(body + "bar.sync 0;" + write, **options)


def test_ldmatrix_reads_for_other_lanes_of_the_warp():
    body = """
    and.b32 %r5, %r1, 31; shl.b32 %r5, %r5, 4; add.s32 %r5, %r2, %r5;
    setp.lt.u32 %p1, %r1, 32;
    @!%p1 bra DONE;
    st.shared.v4.b32 [%r5], {%r1, %r1, %r1, %r1};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r10, %r11}, [%r5];
    DONE: mov.u32 %r12, 0;
    """
    execute(body, shared=512)
    assert found(body.replace("bar.warp.sync -1;", ""), shared=512).kind == "race"


def test_halves_are_compared_each_on_its_own():
    """PTX ISA, "Half Precision Comparison Instructions: setp": p of the lower halves, q of the upper."""
    body = """
    mov.b32 %r5, 0x3F80BF80;  // bfloat16: 1 above -1
    mov.b32 %r6, 0;
    setp.lt.bf16x2 %p1|%p2, %r5, %r6;
    selp.b32 %r7, 1, 0, %p1;
    selp.b32 %r8, 2, 0, %p2;
    mov.b32 %r10, 0xBC007E00;  // float16: -1 above NaN
    setp.ltu.f16x2 %p1|%p2, %r10, %r6;
    selp.b32 %r11, 4, 0, %p1;
    selp.b32 %r12, 8, 0, %p2;
    add.s32 %r7, %r7, %r8; add.s32 %r7, %r7, %r11; add.s32 %r7, %r7, %r12;
    st.global.b32 [%rd5], %r7;
    """
    assert execute(body).tolist() == [1 + 4 + 8] * 64
