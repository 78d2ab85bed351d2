"""Dropout's random words, as every fastlm backend draws them: Philox4x32-10, docs/semantics.md."""

import triton
import triton.language as tl


@triton.jit
def dropout_words(seed, block, row, high):
    """The words of counters (block, row, high, 0), four lanes a counter: [..., N / 4] -> uint32 [..., N].

    seed: int64 scalar, the key. block, row, high: uint32 tensors of one shape; word j of the last axis is
    lane j & 3 of block j >> 2.
    """
    w0, w1, w2, w3 = tl.philox(seed, block, row, high, block * 0, n_rounds=10)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
