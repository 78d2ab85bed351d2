"""ptxsim's tensor cores against the PTX ISA's text, element by element."""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastlm.testing.ptxsim import device, run
from fastlm.testing.ptxsim import tensor_cores as tc

RNG = np.random.default_rng(0)
LANES = range(32)


def bits_of(values, kind):
    """float32 values, all of them representable, -> the bits that a kind stores for them."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    if kind == "tf32":
        return values.view(np.uint32)
    return values.astype(np.int8 if kind == "s8" else np.uint8)


def values_of(kind, *shape):
    """Small whole numbers: every product and sum of them is exact in float16."""
    return RNG.integers(0 if kind == "u8" else -4, 5, shape).astype(np.float32)


def words_of(elements):
    """A lane's elements, low to high, as registers."""
    return np.array(elements).view(np.uint32)


# The ISA's formulas: groupID = %laneid >> 2, threadID_in_group = %laneid % 4; ai, bi, ci count a thread's
# elements from low to high.


def a_place(shape, kind, lane, i):
    group, thread = lane >> 2, lane % 4
    if shape == "m16n8k16" and kind in ("f16", "bf16"):
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    if shape == "m16n8k8" and kind in ("f16", "bf16"):
        return group if i < 2 else group + 8, thread * 2 + (i & 1)
    if shape == "m16n8k8":  # tf32
        return group if i in (0, 2) else group + 8, thread if i < 2 else thread + 4
    if shape == "m16n8k4":
        return group if i == 0 else group + 8, thread
    if shape == "m16n8k16":  # 8-bit integers
        return group if i < 4 else group + 8, thread * 4 + (i & 3)
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_place(shape, kind, lane, i):
    group, thread = lane >> 2, lane % 4
    if kind in ("f16", "bf16"):
        return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
    if kind == "tf32":
        return thread + 4 * i, group
    return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group


def c_place(lane, i):
    return (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


SHAPES = [
    ("m16n8k16", "f16", 4, 2),
    ("m16n8k16", "bf16", 4, 2),
    ("m16n8k8", "f16", 2, 1),
    ("m16n8k8", "bf16", 2, 1),
    ("m16n8k8", "tf32", 4, 2),
    ("m16n8k4", "tf32", 2, 1),
    ("m16n8k32", "s8", 4, 2),
    ("m16n8k32", "u8", 4, 2),
    ("m16n8k16", "s8", 2, 1),
]


def fragments(matrix, kind, registers, place):
    """A matrix per warp [W, ..] -> the registers [registers, W, 32] that place(lane, i) says."""
    count = registers * 4 // tc.KINDS[kind].bytes
    bits = bits_of(matrix, kind)
    lanes = [[words_of([m[place(lane, i)] for i in range(count)]) for lane in LANES] for m in bits]
    return np.array(lanes, dtype=np.uint32).transpose(2, 0, 1)


def accumulators(matrix):
    return np.array(
        [[[m[c_place(lane, i)] for lane in LANES] for m in matrix] for i in range(4)], matrix.dtype
    )


@pytest.mark.parametrize(("shape", "kind", "a_registers", "b_registers"), SHAPES)
def test_mma_is_the_product_of_the_matrices_that_the_isa_lays_out(shape, kind, a_registers, b_registers):
    k, dtype = int(shape[6:]), np.int32 if kind in ("s8", "u8") else np.float32
    a, b, c = values_of(kind, 3, 16, k), values_of(kind, 3, k, 8), values_of(kind, 3, 16, 8).astype(dtype)
    got = tc.mma(
        shape,
        kind,
        fragments(a, kind, a_registers, lambda lane, i: a_place(shape, kind, lane, i)),
        fragments(b, kind, b_registers, lambda lane, i: b_place(shape, kind, lane, i)),
        accumulators(c),
    )
    np.testing.assert_array_equal(got, accumulators((a @ b + c).astype(dtype)))
    assert got.dtype == dtype


def test_mma_with_float16_accumulators_packs_two_columns_a_register():
    a, b, c = values_of("f16", 2, 16, 16), values_of("f16", 2, 16, 8), values_of("f16", 2, 16, 8)
    a_words = fragments(a, "f16", 4, lambda lane, i: a_place("m16n8k16", "f16", lane, i))
    b_words = fragments(b, "f16", 2, lambda lane, i: b_place("m16n8k16", "f16", lane, i))
    got = tc.mma("m16n8k16", "f16", a_words, b_words, fragments(c, "f16", 2, c_place))
    np.testing.assert_array_equal(got, fragments(a @ b + c, "f16", 2, c_place))


def one_lane(kind, a_first, b_first, c=0.0, shape="m16n8k16"):
    """d's first element where A's first row is a_first and B's first column b_first, else zeros."""
    k = int(shape[6:])
    a, b = np.zeros((1, 16, k), np.float32), np.zeros((1, k, 8), np.float32)
    a[0, 0, : len(a_first)], b[0, : len(b_first), 0] = a_first, b_first
    a_words = fragments(a, kind, 4, lambda lane, i: a_place(shape, kind, lane, i))
    b_words = fragments(b, kind, 2, lambda lane, i: b_place(shape, kind, lane, i))
    return tc.mma(shape, kind, a_words, b_words, np.full((4, 1, 32), c, np.float32))


def test_mma_rounds_its_sum_once():
    assert one_lane("f16", [4096, 1, 1], [4096, 1, 1])[0, 0, 0] == 2**24 + 2  # one by one in float32: 2**24
    assert one_lane("bf16", [2**24, 1, -(2**24)], [1, 1, 1])[0, 0, 0] == 1


def test_mma_passes_nan_and_infinity_to_their_row_only():
    with np.errstate(invalid="ignore"):
        got = one_lane("bf16", [np.inf], [1])
        assert got[0, 0, 0] == np.inf
        assert np.isnan(got[1, 0, 0])  # infinity times the zeros of column 1
        assert not np.isnan(got[2:]).any()
        assert np.isnan(one_lane("f16", [np.nan], [1])[:2, 0, :4]).all()
    assert one_lane("bf16", [3e38, 3e38], [1, 1])[0, 0, 0] == np.inf


def test_mma_reads_no_more_than_10_bits_of_a_tf32_mantissa():
    got = one_lane("tf32", [1 + 2**-10 + 2**-11 + 2**-23], [1.0], shape="m16n8k8")
    assert got[0, 0, 0] == np.float32(1 + 2**-10)


@pytest.mark.parametrize(("satfinite", "expected"), [(True, 2**31 - 1), (False, -(2**31) + 31)])
def test_integer_mma_wraps_around_unless_satfinite(satfinite, expected):
    ones = np.full((4, 1, 32), 0x01010101, np.uint32)
    got = tc.mma("m16n8k32", "s8", ones, ones[:2], np.full((4, 1, 32), 2**31 - 1, np.int32), satfinite)
    np.testing.assert_array_equal(got, expected)


def test_mma_of_an_unknown_shape_is_refused():
    words = np.zeros((4, 1, 32), np.uint32)
    with pytest.raises(NotImplementedError, match="m16n8k8 f16 with 4 and 2 registers"):
        tc.mma("m16n8k8", "f16", words, words[:2], words.view(np.float32))


# ldmatrix: threads 8m to 8m + 7 give the row addresses of matrix m; thread 4g + t receives elements 2t and
# 2t + 1 of row g.


def test_ldmatrix_takes_eight_addresses_a_matrix():
    addresses = RNG.integers(0, 1000, (3, 32))
    for count in (1, 2, 4):
        rows = tc.ldmatrix_rows(addresses, count)
        assert rows.shape == (3, count, 8)
        for w, m, r in itertools.product(range(3), range(count), range(8)):
            assert rows[w, m, r] == addresses[w, 8 * m + r]


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_each_lane_two_elements_and_stmatrix_takes_them_back(count, trans):
    rows = RNG.integers(0, 2**16, (3, count, 8, 8), dtype=np.uint16)
    words = tc.ldmatrix_fragments(rows, trans)
    for w, m, lane in itertools.product(range(3), range(count), LANES):
        r, c = lane // 4, lane % 4 * 2
        low, high = (rows[w, m, c, r], rows[w, m, c + 1, r]) if trans else rows[w, m, r, c : c + 2]
        assert words[m, w, lane] == int(low) | int(high) << 16
    np.testing.assert_array_equal(tc.stmatrix_rows(words, trans), rows)


def test_ldmatrix_x4_of_a_row_major_tile_is_the_fragment_of_a():
    tile = values_of("f16", 1, 16, 16)
    bits = bits_of(tile, "f16").reshape(1, 2, 8, 2, 8).transpose(0, 3, 1, 2, 4).reshape(1, 4, 8, 8)
    np.testing.assert_array_equal(tc.warp_a(tc.ldmatrix_fragments(bits, False), "f16"), tile)


# ldmatrix.m16n16.trans.b8: threads 16m to 16m + 15 give the row addresses of matrix m; thread 4g + t receives
# elements 4t to 4t + 3 of column g in its first register, of column g + 8 in its second.


@pytest.mark.parametrize("count", [1, 2])
def test_ldmatrix_of_bytes_gives_each_lane_four_elements_of_two_columns(count):
    addresses = RNG.integers(0, 1000, (3, 32))
    np.testing.assert_array_equal(
        tc.ldmatrix_rows(addresses, count, 16).reshape(3, -1), addresses[:, : 16 * count]
    )
    rows = RNG.integers(0, 256, (3, count, 16, 16), dtype=np.uint8)
    words = tc.ldmatrix_bytes(rows)
    for w, m, half, lane in itertools.product(range(3), range(count), range(2), LANES):
        column, first = lane // 4 + 8 * half, lane % 4 * 4
        wanted = bytes(rows[w, m, first : first + 4, column])
        assert words[2 * m + half, w, lane] == int.from_bytes(wanted, "little")


# wgmma's operands in shared memory


def descriptor(start=0, leading=16, stride=0, mode=0, base=0):
    word = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | base << 49 | mode << 62
    return np.array([word], dtype=np.uint64)


def layout(index, shape, strides):
    """CuTe's ((a, b, ..)):((s, t, ..)): the first mode varies fastest."""
    total = 0
    for size, stride in zip(shape, strides, strict=True):
        total += index % size * stride
        index //= size
    return total


def swizzled(offset, bits):
    """CuTe's Swizzle<bits, 4, 3> of a byte offset."""
    return offset ^ (offset >> 3 & ((1 << bits) - 1) << 4)


# The examples below "Canonical Layouts": major, mode field, swizzle bits, bytes, rows, k, layout, LBO, SBO.
# K 32B: 8 columns; the ISA's table says 16, which would run into the next row.
EXAMPLES = {
    "K none tf32": (False, 0, 0, 4, 16, 16, ((8, 2), (4, 4)), ((4, 32), (1, 64)), 64, 32),
    "K 32B tf32": (False, 3, 1, 4, 16, 8, ((8, 2), (4, 2)), ((8, 64), (1, 4)), 4, 64),
    "MN none bf16": (True, 0, 0, 2, 16, 16, ((8, 1, 2), (8, 2)), ((1, 8, 64), (8, 128)), 128, 64),
    "MN 32B bf16": (True, 3, 1, 2, 32, 16, ((8, 2, 2), (8, 2)), ((1, 8, 128), (16, 256)), 128, 256),
    "MN 64B bf16": (True, 2, 2, 2, 64, 16, ((8, 4, 2), (8, 2)), ((1, 8, 256), (32, 512)), 256, 512),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_wgmma_operands_lie_as_in_the_isas_examples(name):
    mn_major, mode, bits, size, rows, k, shape, strides, leading, stride = EXAMPLES[name]
    k = (
        min(k, 8) if name == "K 32B tf32" else k
    )  # its second atom lies elsewhere than the ISA's m = 2, k = 2 says
    got = tc.wgmma_operand(descriptor(1024, leading * size, stride * size, mode), rows, k, size, mn_major)
    for i, j in itertools.product(range(rows), range(k)):
        linear = (layout(i, shape[0], strides[0]) + layout(j, shape[1], strides[1])) * size
        assert got[0, i, j] == 1024 + swizzled(linear, bits)


@pytest.mark.parametrize(("mode", "width"), [(1, 128), (2, 64), (3, 32)])
@pytest.mark.parametrize("advance", [0, 32, 64, 96])
def test_a_start_inside_a_swizzled_row_reads_further_columns(mode, width, advance):
    """16-byte chunk c of row r lies where chunk c ^ (r mod chunks, per repeating pattern) would."""
    if advance >= width:
        return
    got = tc.wgmma_operand(descriptor(2048 + advance, 16, 8 * width, mode), 16, 16, 2, False)
    for r, j in itertools.product(range(16), range(16)):
        chunk, inside = divmod(advance + 2 * j, 16)
        phase = r * width // 128 % (width // 16)
        assert got[0, r, j] == 2048 + r * width + ((chunk ^ phase) * 16) + inside


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("mn_major", [False, True])
def test_no_two_elements_of_an_operand_share_a_place(mode, mn_major):
    width = (16, 128, 64, 32)[mode]
    if mn_major:
        leading, stride = (4096, 128) if mode == 0 else (8 * width, 8 * width * (256 * 2 // width))
    else:
        leading, stride = (4096, 128) if mode == 0 else (16, 8 * width)
    got = tc.wgmma_operand(descriptor(0, leading, stride, mode), 256, 16, 2, mn_major)
    assert np.unique(got).size == 256 * 16
    assert got.max() < 2**18


def test_warpgroups_may_have_descriptors_of_their_own():
    words = np.concatenate(
        [descriptor(0, 16, 1024, 1), descriptor(4096, 16, 1024, 1), descriptor(64, 512, 128)]
    )
    together = tc.wgmma_operand(words, 64, 16, 2, False)
    for i in range(3):
        np.testing.assert_array_equal(together[i], tc.wgmma_operand(words[i : i + 1], 64, 16, 2, False)[0])


def test_a_base_offset_is_refused():
    with pytest.raises(NotImplementedError, match="base offset"):
        tc.wgmma_operand(descriptor(128, 16, 1024, 1, base=1), 64, 16, 2, False)


# wgmma's registers: warp w of a warpgroup holds rows 16w to 16w+15, laid out as mma's A and C


@pytest.mark.parametrize(("kind", "k"), [("f16", 16), ("bf16", 16), ("tf32", 8), ("s8", 32)])
def test_wgmma_is_the_product_of_its_matrices(kind, k):
    n, groups, dtype = 24, 2, np.int32 if kind == "s8" else np.float32
    a, b = values_of(kind, groups, 64, k), values_of(kind, groups, n, k)
    d = values_of(kind, groups, 64, n).astype(dtype)
    shape = f"m16n8k{k}"
    a_words = fragments(a.reshape(8, 16, k), kind, 4, lambda lane, i: a_place(shape, kind, lane, i))
    a_read = tc.wgmma_a_fragment(a_words.reshape(4, groups, 128), kind)
    np.testing.assert_array_equal(a_read, a)
    row, column = tc.wgmma_accumulator(n)
    registers = np.ascontiguousarray(d[:, row, column].swapaxes(0, 1))
    product = (a @ b.swapaxes(1, 2)).astype(dtype)
    for scale, expected in ((True, product + d), (False, product)):
        got = tc.wgmma(a, b, registers, scale)
        np.testing.assert_array_equal(got, expected[:, row, column].swapaxes(0, 1))
        assert got.dtype == dtype
    got = tc.wgmma(a, b, registers, np.array([False, True]))
    np.testing.assert_array_equal(got[:, 0], product[0][row, column])
    np.testing.assert_array_equal(got[:, 1], (product + d)[1][row, column])


def test_wgmma_without_scale_d_does_not_read_d():
    a, b = values_of("f16", 1, 64, 16), values_of("f16", 1, 8, 16)
    nans = np.full((4, 1, 128), np.nan, np.float32)
    assert not np.isnan(tc.wgmma(a, b, nans, False)).any()
    assert not np.isnan(tc.wgmma(a, b, nans, np.array([False]))).any()


def test_wgmma_with_float16_accumulators_packs_two_columns_a_register():
    a, b, d = values_of("f16", 2, 64, 16), values_of("f16", 2, 16, 16), values_of("f16", 2, 64, 16)
    row, column = tc.wgmma_accumulator(16)

    def packed(matrix):
        registers = matrix[:, row, column].swapaxes(0, 1)
        return tc.pack(registers[0::2], registers[1::2], "f16")

    np.testing.assert_array_equal(tc.wgmma(a, b, packed(d), True), packed(a @ b.swapaxes(1, 2) + d))


def test_accumulator_registers_are_numbered_as_the_isa_draws_them():
    row, column = tc.wgmma_accumulator(256)
    assert row.shape == column.shape == (128, 128)
    pairs = set(zip(row.ravel().tolist(), column.ravel().tolist(), strict=True))
    assert pairs == set(itertools.product(range(64), range(256)))
    # thread 37 is lane 5 of warp 1: d0, d1 in row 17, d2, d3 in row 25, columns 2 and 3, d4 eight columns on
    assert row[:5, 37].tolist() == [17, 17, 25, 25, 17]
    assert column[:5, 37].tolist() == [2, 3, 2, 3, 10]


# Conversions


def f32(bits):
    return np.array(bits, dtype=np.uint32).view(np.float32)


def test_packing_rounds_to_nearest_even():
    ties = f32([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000, 0x7F7FFFFF, 0x00008000, 0x80000000])
    assert tc.bf16_bits(ties).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80, 0x7F80, 0x0000, 0x8000]
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, 2**-25, 2**-24 * 1.5, -0.0], np.float32)
    assert tc.f16_bits(values).tolist() == [0x3C00, 0x3C02, 0x7BFF, 0x7C00, 0x0000, 0x0002, 0x8000]


def test_a_nan_stays_a_nan():
    nans = f32([0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7F8000FF, 0x3F800000])
    assert tc.bf16_bits(nans).tolist() == [0x7FFF] * 4 + [0x3F80]
    assert tc.f16_bits(nans).tolist() == [0x7FFF] * 4 + [0x3C00]
    assert tc.tf32_bits(nans).tolist() == [0x7FFFFFFF] * 4 + [0x3F800000]


def test_tf32_rounds_ties_away_from_zero():
    values = f32([0x3F801000, 0x3F800FFF, 0xBF801000, 0x7F7FFFFF, 0x7F800000, 0x80000000])
    expected = [0x3F802000, 0x3F800000, 0xBF802000, 0x7F800000, 0x7F800000, 0x80000000]
    assert tc.tf32_bits(values).tolist() == expected


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_half_survives_unpacking_and_packing(kind):
    halves = np.arange(65536, dtype=np.uint32)
    low, high = tc.unpack(halves | (halves[::-1] << 16), kind)
    numbers = ~np.isnan(low) & ~np.isnan(high)
    np.testing.assert_array_equal(tc.pack(low, high, kind)[numbers], (halves | halves[::-1] << 16)[numbers])
    assert np.isnan(low).sum() == np.isnan(high).sum() == 2 * (1023 if kind == "f16" else 127)


# What Triton compiles uses these layouts, and knows them from elsewhere


@triton.jit
def _matmul(a, b, c, k, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, TURNED: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for first in range(0, k, DEPTH):
        p = first + tl.arange(0, DEPTH)
        left = tl.load(a + i[:, None] * k + p[None, :])
        if TURNED:
            right = tl.load(b + j[None, :] * k + p[:, None])
        else:
            right = tl.load(b + p[:, None] * (tl.num_programs(0) * COLS) + j[None, :])
        total = tl.dot(left, right, total, out_dtype=total.dtype)
    tl.store(c + i[:, None] * (tl.num_programs(0) * COLS) + j[None, :], total)


TILES = [(torch.float16, 32, 16), (torch.bfloat16, 128, 64), (torch.float32, 32, 32), (torch.int8, 64, 64)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("dtype", "cols", "depth"), TILES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_tritons_matmul_is_right(arch, dtype, cols, depth, turned):
    a, b = (
        torch.randint(-8, 9, (64, 2 * depth)).to(dtype),
        torch.randint(-8, 9, (2 * depth, 2 * cols)).to(dtype),
    )
    c = torch.empty(64, 2 * cols, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    with device(arch):
        _matmul[(2,)](
            a, b.T.contiguous() if turned else b, c, 2 * depth, 64, cols, depth, turned, num_stages=2
        )
    assert torch.equal(c.double(), a.double() @ b.double())


# PTX ISA, wgmma.mma_async, a in registers: "wgmma.mma_async.sync.aligned.shape.dtype.bf16.bf16 d, a, b-desc,
# scale-d, imm-scale-a, imm-scale-b, imm-trans-b": nothing says how a lies.
WGMMA = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 128 .b8 memory[];
.visible .entry kernel(.param .u64 y)
{{
.reg .pred %p<2>; .reg .b32 %r<16>; .reg .b64 %d<8>;
mov.u32 %r0, %tid.x; mov.u32 %r1, memory; mad.lo.s32 %r2, %r0, 4, %r1;
and.b32 %r3, %r0, 3; shl.b32 %r3, %r3, 1; add.s32 %r4, %r3, 1;       // 2 numbers of every 8: 0 to 7
cvt.rn.f32.s32 %r3, %r3; cvt.rn.f32.s32 %r4, %r4; cvt.rn.bf16x2.f32 %r3, %r4, %r3;
setp.lt.u32 %p0, %r0, 64; @%p0 st.shared.b32 [%r2], %r3;
fence.proxy.async.shared::cta; bar.sync 0;
cvt.u64.u32 %d0, %r1; shr.u64 %d0, %d0, 4; or.b64 %d0, %d0, 34360262656; // both offsets are 128 bytes
mov.b32 %r5, 0x3F803F80; mov.b32 %r8, 0; mov.b32 %r9, 0; mov.b32 %r10, 0; mov.b32 %r11, 0;
setp.ne.b32 %p1, %r8, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r8,%r9,%r10,%r11}}, {{%r5,%r5,%r5,%r5}},
    %d0, %p1, 1, 1, {trans};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
ld.param.u64 %d1, [y]; mul.wide.u32 %d2, %r0, 4; add.s64 %d1, %d1, %d2; st.global.b32 [%d1], %r9; ret;
}}"""


@pytest.mark.parametrize("trans", [0, 1])
def test_wgmma_of_registers_says_of_b_alone_how_it_lies(trans):
    y = torch.zeros(128)
    run(WGMMA.format(trans=trans), (1, 1, 1), (128, 1, 1), [y], 256)
    of_rows, of_columns = [56.0] * 128, [16.0 * (t % 4 * 2 + 1) for t in range(128)]
    assert y.tolist() == (of_columns if trans else of_rows)
