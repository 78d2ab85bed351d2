"""What tensor cores compute, and where each element of a matrix lies: mma, ldmatrix, stmatrix, wgmma.

Pure functions on numpy arrays. W warps (or G warpgroups of 128 threads) execute one instruction together: a
register of all of them is an array [W, 32] (or [G, 128]) of uint32 bits; a list of registers is an array
[registers, W, 32].

Source: NVIDIA, Parallel Thread Execution ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/:
"Matrix Fragments for mma.m16n8k8", ".. for mma.m16n8k16 with floating point type", ".. for mma.m16n8k32",
"Warp-level matrix load instruction: ldmatrix", "Warp-level matrix store instruction: stmatrix",
"Matrix Fragments for wgmma.mma_async.m64nNk16", "Shared Memory Matrix Layout", "Canonical Layouts",
"Matrix Descriptor Format".

Precision: products are exact; sums are taken in float64 and rounded once, to nearest even, to the type of the
accumulator. The ISA leaves the order, the rounding and the subnormals of the sum open: hardware aligns the
products of a few columns and truncates them, so its last bits differ. Integer sums are exact.
"""

import functools
from typing import NamedTuple

import numpy as np


class Kind(NamedTuple):
    """An element type of the multiplicands: its bytes, and how its bits widen to an exact float."""

    bytes: int
    bits: np.dtype


KINDS = {
    "f16": Kind(2, np.dtype(np.uint16)),
    "bf16": Kind(2, np.dtype(np.uint16)),
    "tf32": Kind(4, np.dtype(np.uint32)),
    "s8": Kind(1, np.dtype(np.int8)),
    "u8": Kind(1, np.dtype(np.uint8)),
}
TF32_MASK = np.uint32(0xFFFFE000)  # sign, 8 bits of exponent, 10 of mantissa: the hardware reads no others
NAN16, NAN32 = np.uint16(0x7FFF), np.uint32(0x7FFFFFFF)  # what cvt makes of any NaN
F16 = np.arange(65536).astype(np.uint16).view(np.float16).astype(np.float32)  # twice as fast as numpy's cast

# Conversions


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """The values of elements of a kind, from their bits (of KINDS[kind].bits), as float32: exact."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "tf32":
        return (bits & TF32_MASK).view(np.float32)
    return F16.take(bits) if kind == "f16" else bits.astype(np.float32)


def f16_bits(values: np.ndarray) -> np.ndarray:
    """float32 or float64 -> the bits of float16, rounded to nearest even: uint16. NaN becomes 0x7fff."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float16).view(np.uint16)
    return _canonical(bits, np.isnan(values), NAN16)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest even: uint16. NaN becomes 0x7fff."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return _canonical(rounded.astype(np.uint16), np.isnan(values), NAN16)


def tf32_bits(values: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32: float32 -> uint32 bits, 10 of mantissa, to nearest, ties away from zero."""
    rounded = (values.view(np.uint32) + np.uint32(0x1000)) & TF32_MASK
    return _canonical(rounded, np.isnan(values), NAN32)


def unpack(words: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """uint32 words of two f16 or bf16 -> (low halves, high halves) as float32, each of the words' shape."""
    if kind == "bf16":
        return (words << np.uint32(16)).view(np.float32), (words & np.uint32(0xFFFF0000)).view(np.float32)
    halves = np.ascontiguousarray(words)[..., None].view(np.uint16)
    return widen(halves[..., 0], kind), widen(halves[..., 1], kind)


def pack(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    """Two float32 arrays -> uint32 words: low in bits 0-15, high in bits 16-31, rounded to nearest even."""
    bits = bf16_bits if kind == "bf16" else f16_bits
    return bits(low).astype(np.uint32) | bits(high).astype(np.uint32) << np.uint32(16)


def _canonical(bits, nan, value):
    if nan.any():
        bits[nan] = value
    return bits


# mma.sync


def mma(shape: str, kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, satfinite=False) -> np.ndarray:
    """mma.sync.aligned.SHAPE.row.col: d = a b + c for each warp.

    shape, kind: m16n8k16 or m16n8k8 with f16 or bf16, m16n8k8 or m16n8k4 with tf32, m16n8k32 or m16n8k16 with
    s8 or u8. a: uint32 [4 or 2, W, 32]. b: uint32 [2 or 1, W, 32]. c: float32 [4, W, 32], for integers int32
    [4, W, 32], or uint32 [2, W, 32], pairs of float16. satfinite: integers stop at their bounds.

    Returns d, as c.
    """
    depth = 4 // KINDS[kind].bytes * 4  # columns of a that one register of each of its two row halves spans
    k_halves = int(shape.removeprefix("m16n8k")) // depth
    if k_halves not in (1, 2) or (a.shape[0], b.shape[0]) != (2 * k_halves, k_halves):
        raise NotImplementedError(f"mma {shape} {kind} with {a.shape[0]} and {b.shape[0]} registers")
    product = _product(warp_a(a, kind), warp_b(b, kind))  # [W, 16, 8]
    warps = product.shape[0]
    # c's register i: row groupID + 8 (i >= 2), column 2 threadID_in_group + (i & 1)
    tiles = product.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(2, 2, warps, 32)
    return _accumulate(tiles, c, satfinite)


def warp_a(words: np.ndarray, kind: str) -> np.ndarray:
    """The matrix A [W, 16, k] in float32 that a warp's registers [2 or 4, W, 32] hold.

    A register holds e elements. Element i of register r of lane 4 g + t: row g + 8 (r & 1), column
    (r >> 1) 4 e + t e + i.
    """
    registers, warps, _ = words.shape
    parts = _elements(words, kind).reshape(registers // 2, 2, warps, 8, 4, -1)
    return widen(np.ascontiguousarray(parts.transpose(2, 1, 3, 0, 4, 5)), kind).reshape(warps, 16, -1)


def warp_b(words: np.ndarray, kind: str) -> np.ndarray:
    """The matrix B, transposed: [W, 8, k] in float32, that a warp's registers [1 or 2, W, 32] hold.

    A register holds e elements. Element i of register r of lane 4 g + t: column g of B, row r 4 e + t e + i.
    """
    registers, warps, _ = words.shape
    parts = _elements(words, kind).reshape(registers, warps, 8, 4, -1)
    return widen(np.ascontiguousarray(parts.transpose(1, 2, 0, 3, 4)), kind).reshape(warps, 8, -1)


def _elements(words, kind):
    return np.ascontiguousarray(words)[..., None].view(KINDS[kind].bits)


def _product(a, b):
    """a [.., m, k] times b [.., n, k] transposed, in float64: exact products, sums to 53 bits."""
    with np.errstate(all="ignore"):
        return np.matmul(a.astype(np.float64), b.astype(np.float64).swapaxes(-1, -2))


def _accumulate(product, c, satfinite=False, keep=True):
    """c + product in c's form. product: float64 [pairs, 2, W, 32]. keep: bool, or bool [W, 1]."""
    shape = (-1, *product.shape[2:])
    with np.errstate(all="ignore"):
        if c.dtype == np.uint32:  # pairs of float16
            pairs = np.stack(unpack(c, "f16"), axis=1)
            return pack(*np.moveaxis(product + np.where(keep, pairs, 0), 1, 0), "f16")
        old = c.reshape(product.shape)
        total = product + (old if keep is True else np.where(keep, old, 0))
        if c.dtype == np.float32:
            return total.astype(np.float32).reshape(shape)
        if satfinite:
            total = np.clip(total, -(2**31), 2**31 - 1)
        return total.astype(np.int64).astype(np.int32).reshape(shape)


# ldmatrix, stmatrix (m8n8, b16), ldmatrix (m16n16, b8)


def ldmatrix_rows(addresses: np.ndarray, count: int, height: int = 8) -> np.ndarray:
    """[W, 32] -> [W, count, height]: lane height m + r holds the address of row r, 16 bytes, of matrix m."""
    return addresses[:, : height * count].reshape(-1, count, height)


def ldmatrix_fragments(rows: np.ndarray, trans: bool) -> np.ndarray:
    """The matrices' rows, uint16 [W, count, 8, 8] -> registers, uint32 [count, W, 32].

    Lane 4 g + t receives elements 2 t and 2 t + 1 of row g; with trans, of column g.
    """
    warps, count = rows.shape[:2]
    matrices = np.ascontiguousarray(rows.swapaxes(2, 3) if trans else rows)
    return matrices.view(np.uint32).reshape(warps, count, 32).transpose(1, 0, 2)


def ldmatrix_bytes(rows: np.ndarray) -> np.ndarray:
    """Rows of 16 x 16 matrices, uint8 [W, count, 16, 16] -> registers, uint32 [2 count, W, 32], of columns.

    Lane 4 g + t receives elements 4 t to 4 t + 3 of column g, and of column g + 8.
    """
    warps, count = rows.shape[:2]
    columns = np.ascontiguousarray(rows.swapaxes(2, 3)).view(np.uint32)
    return columns.reshape(warps, 2 * count, 32).transpose(1, 0, 2)


def stmatrix_rows(words: np.ndarray, trans: bool) -> np.ndarray:
    """Registers, uint32 [count, W, 32] -> rows, uint16 [W, count, 8, 8]: ldmatrix_fragments undone."""
    count, warps, _ = words.shape
    matrices = np.ascontiguousarray(words.transpose(1, 0, 2)).view(np.uint16).reshape(warps, count, 8, 8)
    return matrices.swapaxes(2, 3) if trans else matrices


# wgmma.mma_async


def wgmma_operand(
    descriptor: np.ndarray, rows: int, k: int, element_bytes: int, mn_major: bool
) -> np.ndarray:
    """Where a matrix lies in shared memory: descriptor uint64 [G] -> byte addresses, int64 [G, rows, k].

    rows: 64 for A, n for B. mn_major: the instruction's imm-trans.
    """
    known, which = np.unique(descriptor, return_inverse=True)  # most often all blocks have the same
    if known.size > 1:
        each = [wgmma_operand(word, rows, k, element_bytes, mn_major) for word in known[:, None]]
        return np.concatenate(each)[which]
    word = int(known[0])
    offsets, swizzle = _operand_offsets(word >> 14, rows, k, element_bytes, mn_major)
    addresses = ((word & 0x3FFF) << 4) + offsets
    return np.broadcast_to(addresses ^ (addresses >> 3 & swizzle), (descriptor.size, rows, k))


@functools.lru_cache(maxsize=256)
def _operand_offsets(fields, rows, k, element_bytes, mn_major):
    """Each element's bytes from the start, [rows, k], before swizzling; the bits of an address that swizzling
    XORs with those 3 places above them. fields: the descriptor without its start address.
    """
    leading, stride = (fields >> 2 & 0x3FFF) << 4, (fields >> 18 & 0x3FFF) << 4
    width = (16, 128, 64, 32)[fields >> 48]  # bytes of a row of the swizzle atom
    if fields >> 35 & 7:
        raise NotImplementedError("wgmma: a matrix descriptor with a base offset")
    i, j = np.arange(rows)[:, None], np.arange(k)
    if mn_major:
        wide = width // element_bytes  # rows that lie side by side
        far, deep = (stride, leading) if width == 16 else (leading, stride)
        offsets = i % wide * element_bytes + i // wide * far + j % 8 * width + j // 8 * deep
    else:
        step = 16 // element_bytes
        far = leading if width == 16 else 16
        offsets = i % 8 * width + i // 8 * stride + j % step * element_bytes + j // step * far
    offsets = np.ascontiguousarray(offsets, dtype=np.int64)
    offsets.flags.writeable = False
    return offsets, width - 16


def wgmma_a_fragment(words: np.ndarray, kind: str) -> np.ndarray:
    """The matrix A [G, 64, k] in float32 that a warpgroup's registers, uint32 [4, G, 128], hold."""
    groups = words.shape[1]  # each of the four warps holds 16 rows, as for mma
    return warp_a(words.reshape(4, groups * 4, 32), kind).reshape(groups, 64, -1)


@functools.cache
def wgmma_accumulator(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) in D [64, n] of register r of thread t: two arrays [n / 2, 128]."""
    r, t = np.arange(n // 2)[:, None], np.arange(128)
    row = t // 32 * 16 + t % 32 // 4 + r // 2 % 2 * 8
    return row, r // 4 * 8 + t % 4 * 2 + r % 2


def wgmma(a: np.ndarray, b: np.ndarray, d: np.ndarray, scale_d: bool | np.ndarray) -> np.ndarray:
    """wgmma.mma_async: a [G, 64, k] times b [G, n, k] transposed, plus d where scale_d.

    a, b: the elements' values, in float32. d: float32 or int32 [n / 2, G, 128], or uint32 [n / 4, G, 128],
    pairs of float16. scale_d: True, False, or bool [G].

    Returns the new d, as d.
    """
    groups, n = b.shape[:2]
    # warp, half of its rows, row, block of 8 columns, pair, column of the pair
    product = _product(a, b).reshape(groups, 4, 2, 8, n // 8, 4, 2)
    tiles = product.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 4, 2, groups, 128)
    return _accumulate(tiles, d, keep=scale_d if scale_d is True else np.asarray(scale_d).reshape(-1, 1))
