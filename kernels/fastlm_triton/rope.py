"""rope: y_a = a * cos_a - b * sin_a, y_b = b * cos_b + a * sin_b for each pair (a, b); the rest is copied.

A program takes the tables of BLOCK_S positions once, in registers, and turns those positions of some heads
one after the other. Backward applies the transpose: y_a = a * cos_a + b * sin_b, y_b = b * cos_b - a * sin_a.
Bound by memory; floor: x and the tables read once, y written once. Source: Su et al., "RoFormer: Enhanced
Transformer with Rotary Position Embedding", https://arxiv.org/abs/2104.09864.
"""

import torch
import triton
import triton.language as tl

from ._config import Config, cdiv, config_for, next_power_of_2
from ._launch import launch


def rope_config(arch: int, itemsize: int, tables: int, heads: int, half: int) -> Config:
    """(positions of a program, pairs of a program, heads of a program).

    tables: positions of all tables, batch * seq.
    """
    pairs = min(next_power_of_2(half), 256)  # wider rows are cut: the four tables stay in registers
    # 16 bytes of a and of b for each of 128 threads; more would hold over 32 registers of tables
    positions = max(2048 // itemsize // pairs, 1)
    programs = cdiv(tables, positions) * cdiv(half, pairs)
    parts = min(cdiv(512, programs), heads)  # 512 programs fill 132 SMs; beyond, tables are read once
    return Config((positions, pairs, cdiv(heads, parts)), warps=4)


@triton.jit(do_not_specialize=["heads_each", "seq_blocks", "head_blocks"])
def rotate_rows(
    x, cos, sin, y, heads, seq, half, dim, x_batch, x_head, x_seq, y_batch, y_head, y_seq, cos_batch, cos_seq,
    sin_batch, sin_seq, heads_each, seq_blocks, head_blocks, INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr, TAIL: tl.constexpr, BLOCK_S: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Programs: (positions, fastest, then heads, then sequences; columns)."""
    program = tl.program_id(0)
    pos = (program % seq_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    first = (program // seq_blocks % head_blocks) * heads_each
    batch = (program // seq_blocks // head_blocks).to(tl.int64)
    col = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = (pos < seq)[:, None]
    mask = inside & (col < half)[None, :]
    row = pos.to(tl.int64)[:, None]
    cos += batch * cos_batch + row * cos_seq + col[None, :]
    sin += batch * sin_batch + row * sin_seq + col[None, :]
    cos_a, cos_b = tl.load(cos, mask, 0.0).to(tl.float32), tl.load(cos + half, mask, 0.0).to(tl.float32)
    sin_a, sin_b = tl.load(sin, mask, 0.0).to(tl.float32), tl.load(sin + half, mask, 0.0).to(tl.float32)
    if TRANSPOSED:
        of_b, of_a = sin_b, -sin_a
    else:
        of_b, of_a = -sin_a, sin_b
    both = tl.program_id(1) * PAIRS * 2 + tl.arange(0, PAIRS * 2)[None, :]  # where pairs are neighbours
    both_mask = inside & (both < 2 * half)
    rest_mask = inside & (col < dim - 2 * half)[None, :]
    x += batch * x_batch + first.to(tl.int64) * x_head + row * x_seq
    y += batch * y_batch + first.to(tl.int64) * y_head + row * y_seq
    for _ in range(first, min(first + heads_each, heads)):
        if INTERLEAVED:
            pairs = tl.load(x + both, both_mask, 0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(pairs, [BLOCK_S, PAIRS, 2]))
            turned = tl.join(a * cos_a + b * of_b, b * cos_b + a * of_a)
            tl.store(y + both, tl.reshape(turned, [BLOCK_S, PAIRS * 2]), both_mask)
        else:
            a = tl.load(x + col[None, :], mask, 0.0).to(tl.float32)
            b = tl.load(x + half + col[None, :], mask, 0.0).to(tl.float32)
            tl.store(y + col[None, :], a * cos_a + b * of_b, mask)
            tl.store(y + half + col[None, :], b * cos_b + a * of_a, mask)
        if TAIL:
            rest = tl.load(x + 2 * half + col[None, :], rest_mask, 0.0)
            tl.store(y + 2 * half + col[None, :], rest, rest_mask)
        x += x_head
        y += y_head


def _table(table: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(table, its elements from sequence to sequence, from position to position); copied if not in rows."""
    table = table if table.stride(-1) == 1 else table.contiguous()
    return table, table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0, table.stride(-2)


def _rotate(x, cos, sin, interleaved: bool, transposed: bool) -> torch.Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    y = torch.empty_like(x)  # heads and positions lie in memory as in x
    if y.numel() == 0:
        return y
    (batch, heads, seq, dim), half = x.shape, cos.shape[-1] // 2
    config = config_for(rope_config, x.device, x.element_size(), batch * seq, heads, half)
    positions, pairs, heads_each = config.block
    cos, *cos_strides = _table(cos)
    sin, *sin_strides = _table(sin)
    seq_blocks, head_blocks = cdiv(seq, positions), cdiv(heads, heads_each)
    tail = dim - 2 * half
    grid = seq_blocks * head_blocks * batch, cdiv(max(half, tail), pairs)
    strides = *x.stride()[:3], *y.stride()[:3], *cos_strides, *sin_strides
    blocks, flags = (heads_each, seq_blocks, head_blocks), (interleaved, transposed, tail > 0)
    launch(
        rotate_rows, grid,
        x, cos, sin, y, heads, seq, half, dim, *strides, *blocks, *flags, positions, pairs,
        num_warps=config.warps,
    )  # fmt: skip
    return y


def forward(x, cos, sin, interleaved):
    """y, laid out in memory as x is."""
    return _rotate(x, cos, sin, interleaved, False)


def backward(dy, cos, sin, interleaved):
    """dx, laid out in memory as dy is."""
    return _rotate(dy, cos, sin, interleaved, True)
