"""What the kernels on rows share: tensors as rows, tiles, dropout's factors, sums over blocks of rows."""

import torch
import triton
import triton.language as tl

from ._config import Config, cdiv, next_power_of_2
from ._launch import launch
from ._philox import dropout_words

# Kernels that sum products over the lanes of a row: were the last product fused with the first sum of a
# butterfly, each lane would round another one of two products, and lanes would disagree about their sum.
SUMS_ALIKE = {"enable_fp_fusion": False}


def as_rows(t: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """(t, elements from row to row), a row being its last axis; a copy where that is not one stride."""
    if t is None:
        return None, 0
    cols = t.shape[-1] if t.dim() else 1
    if t.is_contiguous():
        return t, cols
    if cols == 1 or t.stride(-1) == 1:
        axes = [(size, t.stride(d)) for d, size in enumerate(t.shape[:-1]) if size != 1]
        if all(outer[1] == inner[0] * inner[1] for outer, inner in zip(axes, axes[1:], strict=False)):
            return t, axes[-1][1] if axes else cols
    return t.contiguous(), cols


def parameter(t: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or bias, contiguous."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def output_like(x: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """A new contiguous tensor like x, or an empty one where it is not wanted."""
    if wanted:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty((0,))


def parameter_gradient(t: torch.Tensor | None, x: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """A new vector of x's columns in the dtype of weight or bias t; empty where it is not wanted."""
    cols = x.shape[-1] if x.dim() else 1
    dtype = torch.float32 if t is None else t.dtype
    return x.new_empty((cols if wanted else 0,), dtype=dtype)


def given(t: torch.Tensor) -> torch.Tensor | None:
    """t, or None if it is the empty tensor that stands for an output that is not wanted."""
    return t if t.numel() else None


def dropout_of(p: float, seed: torch.Tensor | None) -> tuple[torch.Tensor | None, int, float]:
    """(seed or None, threshold, scale): a word at or above the threshold keeps its element, times scale."""
    return (seed, int(p * 4294967296.0), 1.0 / (1.0 - p)) if p > 0 else (None, 0, 1.0)


def elementwise_config(arch: int, rows: int, cols: int) -> Config:
    """(rows, columns) of the tile: 8 elements a thread, one 16-byte load of half precision.

    16 programs then fill a multiprocessor's 64 warps and have 32 KB of each input under way.
    """
    width = min(max(next_power_of_2(cols), 4), 1024)
    return Config((1024 // width if rows > 1 else 1, width), warps=4)


def row_blocks(rows: int, tile_rows: int) -> tuple[int, int]:
    """(programs, rows of each) of a sum over rows: cut by shape alone, so that the bits never differ.

    256 programs are two for each multiprocessor of an A100 or H100 and one and a half for a B200's; 512 from
    64 rows for each, so that writing and reading partial sums stays below 5% of the bytes. 8 rows at least.
    """
    programs = min(max(256, rows // 64), 512)
    each = max(cdiv(rows, programs), 8)
    each = cdiv(each, tile_rows) * tile_rows
    return cdiv(rows, each), each


def column_sum_rows(rows: int, across: int, tile_rows: int) -> int:
    """Rows of a block whose dx are summed by one program, by shape alone.

    64 cost 2% more bytes in half precision; fewer where that leaves less than 512 programs, four for each
    multiprocessor; 16 at least.
    """
    each = min(max(rows * across // 512, 16), 64)
    return cdiv(each, tile_rows) * tile_rows


def partials_config(arch: int) -> Config:
    """(partial sums at a time, columns): 64 columns are 256 bytes, and cut 4096 for 64 programs."""
    return Config((16, 64), warps=4)


@triton.jit
def tile_of(cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(first row, first column) of this program's tile; tiles of one band of rows follow one another."""
    across = tl.cdiv(cols, COLS)
    program = tl.program_id(0)
    return (program // across).to(tl.int64) * ROWS, (program % across).to(tl.int64) * COLS


@triton.jit
def keep_scales(seed, first_col, row, threshold, scale, COLS: tl.constexpr):
    """Dropout's factor, 0 or scale, of columns first_col ... first_col + COLS - 1 of rows `row`: [R, COLS].

    seed: int64 pointer. row: int64 [R]. COLS: at least 4, as first_col a multiple of it.
    """
    block = (first_col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
    low, high = row.to(tl.uint32)[:, None], (row >> 32).to(tl.uint32)[:, None]
    low, block = tl.broadcast(low, block)
    high, block = tl.broadcast(high, block)
    words = dropout_words(tl.load(seed), block, low, high)
    return tl.where(words >= threshold, scale, 0.0)


@triton.jit
def add_partials(partials, first_out, second_out, blocks, cols, BLOCKS: tl.constexpr, COLS: tl.constexpr):
    """Sums of partials [blocks, n, cols] over blocks, in their order; program (i, k) writes out k < n."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    which, count = tl.program_id(1), tl.num_programs(1)
    sums = tl.zeros([BLOCKS, COLS], tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = (block.to(tl.int64) * count + which)[:, None] * cols + col[None, :]
        sums += tl.load(partials + at, (block < blocks)[:, None] & (col < cols)[None, :], 0.0)
    total = tl.sum(sums, 0)
    tl.store(first_out + col, total.to(first_out.dtype.element_ty), (col < cols) & (which == 0))
    tl.store(second_out + col, total.to(second_out.dtype.element_ty), (col < cols) & (which == 1))


def add_up(partials: torch.Tensor, outs: list[torch.Tensor], config: Config) -> None:
    """Writes the sums of partials [blocks, len(outs), cols] to outs, [cols] each, in their own dtypes."""
    blocks, count, cols = partials.shape
    grid = (cdiv(cols, config.block[1]), count)
    sums = partials, outs[0], outs[-1]
    launch(add_partials, grid, *sums, blocks, cols, *config.block, num_warps=config.warps)
