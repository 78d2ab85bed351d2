"""Faults that people make in CUDA kernels, planted: each is found and named; without it the kernel passes."""

import struct
from pathlib import Path

import pytest
import torch

from fastlm.testing import ptxsim
from fastlm.testing.compare import judge
from fastlm.testing.ptxsim import cuda_build

PLANTED = Path(__file__).parent / "native" / "planted.cu"


def run(kernel, *arguments, blocks=1, threads=32):
    """On sm_80; an int is the kernel's int32, bytes are as they are."""
    packed = [struct.pack("<i", a) if isinstance(a, int) else a for a in arguments]
    text = cuda_build.kernels(PLANTED, "sm_80")[kernel].decode()
    ptxsim.run(text, (blocks, 1, 1), (threads, 1, 1), packed)


def found(kind, kernel, *arguments, **sizes):
    with pytest.raises(ptxsim.SimulationError, match=rf"{kind}: .*; {kernel}, block \d+, thread \d+"):
        run(kernel, *arguments, **sizes)


def test_a_missing_syncthreads_is_a_race_though_the_result_would_be_right():
    x, y = torch.randn(128), torch.zeros(128)
    run("reversed", x, y, threads=128)
    assert torch.equal(y, x.flip(0))
    found("race", "reversed_without_barrier", x, y, threads=128)


def test_one_element_too_many_is_out_of_bounds():
    x, y = torch.randn(40), torch.zeros(40)
    run("doubled", x, 40, y, blocks=2)
    assert torch.equal(y, 2 * x)
    found("bounds", "doubled_one_more", x, 40, y, blocks=2)


def test_one_element_too_many_inside_a_larger_tensor_is_seen_by_comparing():
    x = torch.randn(48)
    for kernel, same in (("doubled", True), ("doubled_one_more", False)):
        y = torch.zeros(48)
        run(kernel, x, 40, y, blocks=2)
        assert torch.equal(y[:40], 2 * x[:40])
        assert (y[40:] == 0).all() == same


def test_an_access_of_16_bytes_that_is_not_aligned_is_found():
    x, y = torch.randn(40), torch.zeros(40)
    run("doubled_by_four", x, 40, y)
    assert torch.equal(y, 2 * x)
    found("alignment", "doubled_by_four_from_one", x, 40, y)


@pytest.fixture(scope="module")
def far_rows():
    """[3, 40] bytes, 2^31 from row to row: memory that nobody touches costs nothing."""
    rows = torch.empty((1 << 32) + 40, dtype=torch.uint8).as_strided((3, 40), (1 << 31, 1))
    return rows.copy_(torch.arange(120).view(3, 40))


def far(kernel, x, blocks):
    y = torch.zeros(blocks, 40, dtype=torch.uint8)
    run(kernel, x, struct.pack("<q", x.stride(0)), 40, y, blocks=blocks, threads=64)
    return y


def test_an_index_that_overflows_32_bits_is_out_of_bounds(far_rows):
    assert torch.equal(far("rows", far_rows, 3), far_rows)
    with pytest.raises(ptxsim.SimulationError, match="bounds: .*; rows_in_32_bits, block 1"):
        far("rows_in_32_bits", far_rows, 3)


def test_an_index_that_comes_round_to_another_row_is_seen_by_comparing(far_rows):
    y = far("rows_modulo", far_rows, 3)
    assert torch.equal(y[:2], far_rows[:2]) and torch.equal(y[2], far_rows[0])


def test_a_wait_for_too_few_groups_of_copies_is_found():
    x, y = torch.randn(4 * 128), torch.zeros(32)
    run("sums", x, 4, y)
    torch.testing.assert_close(y, x.view(4, 32, 4).sum((0, 2)))
    found("async", "sums_too_early", x, 4, y)


@pytest.mark.parametrize(
    ("kernel", "right"), [("product", True), ("product_exchanged", False), ("product_as_is", False)]
)
def test_a_wrong_layout_of_fragments_breaks_the_2x_rule(kernel, right):
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.zeros(16, 8)
    run(kernel, a, b, c)
    verdict = judge("c", c, (a.float() @ b.float()), a.double() @ b.double())
    assert (verdict.ratio <= 1) == right, verdict
