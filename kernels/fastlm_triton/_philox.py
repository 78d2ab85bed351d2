"""Dropout's random words, as every fastlm backend draws them: Philox4x32-10, docs/semantics.md."""

import triton
import triton.language as tl


@triton.jit
def _product(a, b, IN_PLACE: tl.constexpr):
    """(high, low) word of a product of uint32s.

    IN_PLACE: the compiler gives each thread the numbers whose results it needs. Else it cuts them as evenly
    as it can, as it does before a widening, and moves the results.
    """
    if IN_PLACE:
        high, low = tl.inline_asm_elementwise(
            "{ .reg .b64 wide; mul.wide.u32 wide, $2, $3; mov.b64 {$1, $0}, wide; }",
            "=r,=r,r,r", [a, b], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        wide = a.to(tl.uint64) * b
        high, low = (wide >> 32).to(tl.uint32), wide.to(tl.uint32)
    return high, low


@triton.jit
def wide_philox(seed, c0, c1, c2, IN_PLACE: tl.constexpr):
    """The four words of counters (c0, c1, c2, 0), uint32 of one shape: tl.philox's.

    That takes two multiplications for the two words of a product; this takes one, and registers in pairs.
    seed: int64 scalar, the key. IN_PLACE: see _product.
    """
    key = seed.to(tl.uint64, bitcast=True)
    k0, k1, c3 = key.to(tl.uint32), (key >> 32).to(tl.uint32), c0 * 0
    for _ in tl.static_range(10):
        high0, low0 = _product(c0, 0xD2511F53, IN_PLACE)
        high2, low2 = _product(c2, 0xCD9E8D57, IN_PLACE)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def dropout_words(seed, block, row, high):
    """The words of counters (block, row, high, 0), four lanes a counter: [..., N / 4] -> uint32 [..., N].

    seed: int64 scalar, the key. block, row, high: uint32 tensors of one shape; word j of the last axis is
    lane j & 3 of block j >> 2.
    """
    w0, w1, w2, w3 = tl.philox(seed, block, row, high, block * 0, n_rounds=10)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
