"""Kernels with faults that the static bars must see."""

import triton
import triton.language as tl


@triton.jit
def copied(x, y, size, BLOCK: tl.constexpr):
    """y = x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < size), i < size)


@triton.jit
def crowded(x, y, size, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    """y = x summed TIMES over, backwards: every value is needed to the end."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for n in tl.range(0, size):
        v = tl.load(x + i + n * BLOCK)
        total += tl.cumsum(v * TIMES) * tl.sqrt(v)
    tl.store(y + i, total)


@triton.jit
def counted(x, y, BLOCK: tl.constexpr):
    """y += the sum of x, in no certain order."""
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


@triton.jit
def multiplied(a, b, out, size, N: tl.constexpr, STAGES: tl.constexpr):
    """out [N, N] = a [N, size] b [size, N]."""
    i, k = tl.arange(0, N), tl.arange(0, 32)
    total = tl.zeros([N, N], tl.float32)
    for start in tl.range(0, size, 32, num_stages=STAGES):
        left = tl.load(a + i[:, None] * size + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * N + i[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + i[:, None] * N + i[None, :], total)
