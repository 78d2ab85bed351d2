"""What single PTX instructions compute, on numpy arrays of one number per thread.

Approximate instructions (ex2.approx, rcp.approx, div.full, ...) are off in the last bit, as a GPU's are: the
PTX ISA allows them one or two, without saying where. fma rounds twice, which shows once in 2^29.
Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/, section 9.7.
"""

import numpy as np

from . import tensor_cores

U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I1, I2, I4, I8, F2, F4, F8 = np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64
_SMALLEST = np.float32(2.0**-126)
to_bf16, to_tf32 = tensor_cores.bf16_bits, tensor_cores.tf32_bits  # cvt.rn.bf16.f32, cvt.rna.tf32.f32


def flush(x):
    """.ftz: subnormal numbers become zeros of their sign."""
    small = np.abs(x) < _SMALLEST
    return np.where(small, np.copysign(F4(0), x), x) if small.any() else x


def approximate(exact):
    """Of float64 one of the two float32 beside it: half of them the farther, if it is not all but a float32.

    Which half is as good as drawn, and the same for the same result. On an H100 a case failed that passed
    while these instructions were correctly rounded here.
    """
    nearest = exact.astype(F4)
    bits, beyond = nearest.view(I4), np.abs(exact) > np.abs(nearest)
    drawn = bits.view(U4) * U4(0x9E3779B1) >> U4(31) == 1
    drawn &= np.abs(exact - nearest) > np.abs(nearest) * F4(2.0**-27)  # an eighth of the last bit at most
    drawn &= np.isfinite(nearest) & (np.abs(nearest) > _SMALLEST)
    return np.where(drawn, np.where(beyond, bits + I4(1), bits - I4(1)), bits).view(F4)


def fma(a, b, c):
    """fma.rn.f32: the product is exact in float64."""
    return (a.astype(F8) * b + c).astype(F4)


def fma_down(a, b, c):
    """fma.rm.f32: rounded towards minus infinity, from the exact sum as two float64."""
    product, c = a.astype(F8) * b, c.astype(F8)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    nearest = total.astype(F4)
    down = np.where(nearest - total > lost, np.nextafter(nearest, F4(-np.inf)), nearest)
    return np.where((total == 0) & (np.signbit(product) | np.signbit(c)), F4(-0.0), down)


def saturate(x):
    """cvt.sat: clamped to [0, 1]; NaN becomes 0."""
    return np.clip(np.nan_to_num(x, nan=0.0), F4(0), F4(1)) + F4(0)


def high(a, b, wide):
    """mul.hi of 16 or 32 bits; wide: the type of twice as many."""
    return (a.astype(wide) * b.astype(wide) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)


def high64(a, b):
    """mul.hi.u64, by halves of 32 bits."""
    low, shift = U8(0xFFFFFFFF), U8(32)
    a0, a1, b0, b1 = a & low, a >> shift, b & low, b >> shift
    middle = a1 * b0 + (a0 * b0 >> shift)
    return a1 * b1 + (middle >> shift) + ((middle & low) + a0 * b1 >> shift)


def high64_signed(a, b):
    """mul.hi.s64."""
    unsigned = high64(a.view(U8), b.view(U8)).view(I8)
    return unsigned - np.where(a < 0, b, I8(0)) - np.where(b < 0, a, I8(0))


def quotient(a, b):
    """div of integers: towards zero; by zero all bits are set (unspecified by the ISA)."""
    zero, safe = b == 0, np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(zero, ~a.dtype.type(0), a // safe)
    whole = a // safe
    return np.where(zero, a.dtype.type(-1), whole + ((a % safe != 0) & ((a < 0) != (safe < 0))))


def remainder(a, b):
    """rem of integers: the sign of a."""
    zero, safe = b == 0, np.where(b == 0, b.dtype.type(1), b)
    return np.where(zero, a, np.fmod(a, safe))


def shift_left(a, n):
    """shl: 0 from the width on."""
    width = n.dtype.type(a.dtype.itemsize * 8)
    return np.where(n < width, a << np.minimum(n, width - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a, n):
    """shr: of a signed number the sign fills."""
    width = n.dtype.type(a.dtype.itemsize * 8)
    shifted = a >> np.minimum(n, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < width, shifted, a.dtype.type(0))


def funnel_left(a, b, n):
    """shf.l.wrap.b32: the upper 32 bits of b:a << (n & 31)."""
    both = b.astype(U8) << U8(32) | a
    return (both << (n & U4(31)).astype(U8) >> U8(32)).astype(U4)


def funnel_right(a, b, n):
    """shf.r.wrap.b32: the lower 32 bits of b:a >> (n & 31)."""
    both = b.astype(U8) << U8(32) | a
    return (both >> (n & U4(31)).astype(U8)).astype(U4)


def extract(a, position, length):
    """bfe.u32: `length` bits of a from `position` on."""
    p, n = (position & U4(255)).astype(U8), (length & U4(255)).astype(U8)
    mask = (U8(1) << np.minimum(n, U8(32))) - U8(1)
    return (a.astype(U8) >> np.minimum(p, U8(63)) & mask).astype(U4)


def extract_signed(a, position, length):
    """bfe.s32: the field's upper bit fills; a field past bit 31 ends there."""
    p, n = (position & U4(255)).astype(I8), (length & U4(255)).astype(I8)
    wide = a.astype(I8) >> np.minimum(p, 31)
    n = np.minimum(n, 32)
    return np.where(n == 0, 0, wide << (64 - np.maximum(n, 1)) >> (64 - np.maximum(n, 1))).astype(I4)


def insert(a, b, position, length):
    """bfi.b32: `length` bits of a put into b at `position`."""
    p, n = (position & U4(255)).astype(U8), np.minimum((length & U4(255)).astype(U8), U8(32))
    mask = ((U8(1) << n) - U8(1)) << np.minimum(p, U8(63)) & U8(0xFFFFFFFF)
    return (b & ~mask | a.astype(U8) << np.minimum(p, U8(63)) & mask).astype(U4)


def permute(a, b, selector):
    """prmt.b32: byte i is byte (selector >> 4 i & 7) of b:a, or its sign eight times."""
    both = b.astype(U8) << U8(32) | a
    result = U4(0)
    for i in range(4):
        nibble = selector >> U4(4 * i) & U4(15)
        byte = (both >> ((nibble & U4(7)) << U4(3)).astype(U8)).astype(U4) & U4(255)
        sign = np.where(byte & U4(128), U4(255), U4(0))
        result = result | np.where(nibble & U4(8), sign, byte) << U4(8 * i)
    return result


def lookup3(a, b, c, table):
    """lop3.b32: bit i is bit (a_i b_i c_i) of the table."""
    table, result = int(table[0]), U4(0)
    for i in range(8):
        if table >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result if table else a & U4(0)


def count_bits(a):
    """popc.b32."""
    return np.bitwise_count(a).astype(U4)


def leading_zeros(a):
    """clz.b32."""
    return (32 - np.frexp(a.astype(F8))[1]).astype(U4)


def to_integer(x, dtype, rounding):
    """cvt from floating point: rounded, clamped to the type; NaN to 0, if 64 bits wide to the upper bit."""
    bounds = np.iinfo(dtype)
    wide = x.dtype == F8 or bounds.bits == 64
    nan = np.array([1 << bounds.bits - 1 if wide else 0], f"u{bounds.bits // 8}").view(dtype)
    rounded = rounding(x.astype(F8))
    inside = np.clip(np.nan_to_num(rounded, nan=0.0), float(bounds.min), float(bounds.max))
    whole = np.where(inside >= float(bounds.max), 0, inside).astype(dtype)
    whole = np.where(inside >= float(bounds.max), dtype(bounds.max), whole)
    return np.where(np.isnan(x), nan, whole)


def away(x):
    """Rounded to the nearest integer, halves away from zero."""
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


def from_bf16(bits):
    """bfloat16 bits -> float32, exact."""
    return (bits.astype(U4) << U4(16)).view(F4)


def maximum(a, b, larger=np.fmax):
    """max: of NaN and a number the number (with np.maximum NaN); +0 is above -0."""
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), b, a), larger(a, b))


def minimum(a, b, smaller=np.fmin):
    """min: of NaN and a number the number (with np.minimum NaN); -0 is below +0."""
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), a, b), smaller(a, b))


def joint_sign(function, a, b):
    """max.xorsign.abs and min.xorsign.abs: of the magnitudes, with the signs' product; NaN only of two."""
    negative = np.signbit(a) ^ np.signbit(b)
    chosen = function(np.abs(a), np.abs(b))
    return np.where(negative, -chosen, chosen)


def halves(a):
    """A 32-bit register as two of 16, the lower first."""
    return (a & U4(0xFFFF)).astype(U2), (a >> U4(16)).astype(U2)


def joined(low, high):
    """Two of 16 bits as one of 32."""
    return low.astype(U4) | high.astype(U4) << U4(16)


def words(a):
    """A 64-bit register as two of 32, the lower first."""
    return (a & U8(0xFFFFFFFF)).astype(U4), (a >> U8(32)).astype(U4)


def joined_words(low, high):
    """Two of 32 bits as one of 64."""
    return low.astype(U8) | high.astype(U8) << U8(32)


def in_pairs(function, *operands):
    """An instruction .f32x2: on both halves of 64-bit registers."""
    split = [words(o) for o in operands]
    low, high = (function(*(s[i].view(F4) for s in split)) for i in range(2))
    return joined_words(low.view(U4), high.view(U4))


def in_half_pairs(function, *operands):
    """An instruction .f16x2: on both halves of 32-bit registers."""
    split = [halves(o) for o in operands]
    low, high = (function(*(s[i].view(F2) for s in split)) for i in range(2))
    return joined(low.view(U2), high.view(U2))


def in_bf16_pairs(function, *operands):
    """An instruction .bf16x2: on both halves of 32-bit registers, rounded once."""
    split = [halves(o) for o in operands]
    low, high = (to_bf16(function(*(from_bf16(s[i]) for s in split)).astype(F4)) for i in range(2))
    return joined(low, high)
