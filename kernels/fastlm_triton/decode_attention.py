"""decode_attention: out = softmax(scale * q k^T + alibi, over the keys that a query may attend to) v.

Of sequence b, with n = lengths[b] and off = n - queries, query i attends to the keys j <= i + off, j < n and
j >= i + off - left; csrc/contract/decode_attention.h has the rest. Bound by the bytes of the cache: its floor
is the keys and values in reach, read once; below some 300 rows a kv head no GPU computes longer than it
reads. A program takes a tile of rows (row r of a kv head is query r % queries of the r / queries-th of the
query heads that share it) and one split of the keys: scores and softmax stay in registers, keys and values
come through shared memory. How many splits there are follows from shapes alone, so that nothing waits for
the lengths and a CUDA graph may replay the launch with others; how long they are, from the length, on the
device. A split without keys writes nothing and is not read; a second kernel merges the rest, a row a program.

Strides and widths come in units of UNIT elements, 16 bytes or one: so the compiler knows what they are
multiples of without compiling again for each. Sources: Dao et al., "Flash-Decoding",
https://pytorch.org/blog/flash-decoding; Kwon et al., "PagedAttention", https://arxiv.org/abs/2309.06180.
"""

import torch
import triton
import triton.language as tl

from ._attention import tanh
from ._config import Config, arch_of, cdiv, config_for, next_power_of_2
from ._kv_cache import readable_rows, scale_strides, strides_in_units
from ._launch import launch
from ._matmul import dot_kind

_LOG2E = tl.constexpr(1.4426950408889634)
_FAR = 1 << 30  # keys before a query: farther than any cache is long
_SCALARS = (  # arguments whose values say nothing about how to compile
    *("q_b", "q_h", "q_s", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "ks_b", "ks_h", "ks_s", "vs_b", "vs_h"),
    *("vs_s", "slopes_b", "slopes_h", "table_b", "rows", "heads", "kv_heads", "group", "queries", "dim"),
    *("value_dim", "pages", "page", "capacity", "splits", "left"),
)


def split_config(arch: int, size: int, cache_size: int, paged: bool, rows: int, dim: int) -> Config:
    """block: rows, keys. size, cache_size: bytes of a number of q and of the cache. dim: columns padded."""
    if cache_size == 4:  # multiplied without tensor cores: a thread holds whole rows of few, or it spills
        return Config((4 if rows <= 4 else 16, min(64, max(16, 2048 // dim))), 4, 3 if paged else 2)
    block_m = 16 if rows <= 16 else 32  # more rows in a tile take too many registers for two blocks an SM
    block_n = min(128 if cache_size == 2 else 64, 8192 // dim)  # 16 KB of keys: two blocks fit into 100 KB
    # in pages the third stage holds page numbers; else more bytes, where an SM has 163 KB
    return Config((block_m, block_n), 4, 3 if paged or arch in (80, 90, 100) else 2)


def splits_of(arch: int, programs: int, keys: int) -> int:
    """How many splits of the keys. programs: without splits. keys: at most in reach of a sequence."""
    sms = 108 if arch < 90 else 132 if arch < 100 else 148  # A100, H100, B200
    wave = 2 * sms // max(1, programs)  # two blocks an SM keep enough bytes in flight, and none waits
    return max(1, min(wave, 128, cdiv(keys, 128)))  # less than 128 keys do not fill the pipeline


def merge_config(arch: int, value_dim: int) -> Config:
    """block: splits read at a time. value_dim: columns padded."""
    return Config((max(1, 4096 // value_dim),), 4, 1)  # 32 numbers a thread


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)  # of a difference: exact for keys whose scores are near the largest


@triton.jit
def _dot(x, y, acc, PRECISION: tl.constexpr):
    """x @ y + acc. An int8 y is exact in any half; a float32 x is then, exactly, a sum of three bfloat16."""
    if PRECISION == "half":
        return tl.dot(x, y.to(x.dtype), acc)
    elif y.dtype != tl.int8:
        return tl.dot(x, y, acc, input_precision=PRECISION)
    else:
        high = x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        low = (x - middle.to(tl.float32)).to(tl.bfloat16)
        y = y.to(tl.bfloat16)
        return tl.dot(high, y, tl.dot(middle, y, tl.dot(low, y, acc)))


@triton.jit
def _keys_in_reach(lengths, batch, capacity, queries, left, splits, BN: tl.constexpr):
    """The keys [first, end) that a sequence's queries reach, and how many of them a split takes."""
    end = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), capacity)
    first = tl.maximum(end - queries - left, 0)
    return first, end, tl.cdiv(tl.cdiv(end - first, splits), BN) * BN


@triton.jit
def _row_of(batch, kv_head, r, kv_heads, group, queries):
    """Row r's query head and query, and where it lies in [batch, heads, queries]."""
    head = kv_head * group + r // queries
    query = r % queries
    return head, query, (batch * (kv_heads * group) + head) * queries + query


@triton.jit(do_not_specialize=_SCALARS)
def split_kernel(
    q, k, v, lengths, table, k_scale, v_scale, slopes, out, lse, parts,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, ks_b, ks_h, ks_s, vs_b, vs_h, vs_s, slopes_b, slopes_h,
    table_b, rows, kv_heads, group, queries, dim, value_dim, pages, page, capacity, splits, scale, left,
    softcap, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (batch * kv_heads, split, tile of rows). parts: None where there is one split."""
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    split = tl.program_id(1)
    first, n, share = _keys_in_reach(lengths, batch, capacity, queries, left, splits, BN)
    begin = first + split * share
    end = tl.minimum(begin + share, n)
    if parts is not None:
        if begin >= end:
            return

    r = tl.program_id(2) * BM + tl.arange(0, BM)
    head, query, index = _row_of(batch, kv_head, r, kv_heads, group, queries)
    inside = r < group * queries
    own = query + (n - queries)
    width, value_width = dim * UNIT, value_dim * UNIT
    cols, value_cols = tl.arange(0, BD), tl.arange(0, BV)
    start = (batch * q_b + head * q_h + query * q_s) * UNIT
    q_tile = tl.load(q + start[:, None] + cols, mask=inside[:, None] & (cols < width), other=0.0)
    k += kv_head * k_h * UNIT + cols
    v += kv_head * v_h * UNIT + value_cols
    if softcap is not None:
        scale /= softcap
    if slopes is not None:
        slope = tl.load(slopes + batch * slopes_b + head * slopes_h, mask=inside, other=0.0)

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for j in tl.range(begin, end, BN):
        t = j + tl.arange(0, BN)
        present = t < end  # slots from the length on are never read
        if table is None:
            number, slot = batch, t.to(tl.int64)
        else:
            number = tl.load(table + batch * table_b + t // page, mask=present, other=0).to(tl.int64)
            number = tl.where((number >= 0) & (number < pages), number, 0)  # no such page: the first instead
            slot = (t % page).to(tl.int64)
        k_at = (number * k_b + slot * k_s) * UNIT
        k_tile = tl.load(k + k_at[:, None], mask=present[:, None] & (cols < width), other=0)
        s = _dot(q_tile, tl.trans(k_tile), tl.zeros([BM, BN], tl.float32), PRECISION)
        if k_scale is not None:
            s *= tl.load(k_scale + number * ks_b + kv_head * ks_h + slot * ks_s, mask=present, other=0.0)
        s *= scale
        if softcap is not None:
            s = softcap * tanh(s)
        if slopes is not None:
            s -= slope[:, None] * (own[:, None] - t).to(tl.float32)

        keep = (t <= own[:, None]) & (t >= own[:, None] - left)
        before = top
        top = tl.maximum(top, tl.max(tl.where(keep, s, -float("inf")), 1))
        shift = tl.where(top == -float("inf"), 0.0, top)
        p = tl.where(keep, _exp(s - shift[:, None]), 0.0)
        shrink = _exp(before - shift)
        total = total * shrink + tl.sum(p, 1)
        acc *= shrink[:, None]

        v_at = (number * v_b + slot * v_s) * UNIT
        v_tile = tl.load(v + v_at[:, None], mask=present[:, None] & (value_cols < value_width), other=0)
        if v_scale is None:
            acc = _dot(p.to(q_tile.dtype), v_tile, acc, PRECISION)
        else:
            scales = tl.load(v_scale + number * vs_b + kv_head * vs_h + slot * vs_s, mask=present, other=0.0)
            largest = tl.max(scales, 0)
            largest = tl.where(largest == 0, 1.0, largest)
            p *= scales / largest  # within [0, 1]: with small scales the weights would vanish in a half
            acc += _dot(p.to(q_tile.dtype), v_tile, tl.zeros([BM, BV], tl.float32), PRECISION) * largest

    acc *= tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    total = tl.where(total == 0, -float("inf"), top + tl.log(total))
    wanted = inside[:, None] & (value_cols < value_width)
    if parts is None:
        at = ((batch * queries + query) * (kv_heads * group) + head) * value_width
        tl.store(out + at[:, None] + value_cols, acc.to(out.dtype.element_ty), mask=wanted)
        tl.store(lse + index, total, mask=inside)
    else:
        index = index * splits + split
        tl.store(parts + (index * value_width)[:, None] + value_cols, acc, mask=wanted)
        tl.store(parts + rows.to(tl.int64) * splits * value_width + index, total, mask=inside)


@triton.jit(do_not_specialize=_SCALARS)
def merge_kernel(
    parts, lengths, out, lse, rows, heads, queries, value_dim, capacity, splits, left,
    UNIT: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Program: a row. parts: [rows, splits, value_dim] of outputs, then [rows, splits] of their lse."""
    index = tl.program_id(0)
    batch, head, query = index // queries // heads, index // queries % heads, index % queries
    first, n, share = _keys_in_reach(lengths, batch, capacity, queries, left, splits, BN)
    used = tl.cdiv(n - first, tl.maximum(share, 1))
    width = value_dim * UNIT
    row = index.to(tl.int64) * splits
    sums = parts + rows.to(tl.int64) * splits * width + row
    parts += row * width
    cols = tl.arange(0, BV)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([BV], tl.float32)
    for s in tl.range(0, used, BS):
        split = s + tl.arange(0, BS)
        present = split < used
        part_lse = tl.load(sums + split, mask=present, other=-float("inf"))
        at = parts + split[:, None] * width + cols
        part = tl.load(at, mask=present[:, None] & (cols < width), other=0.0)
        before = top
        top = tl.maximum(top, tl.max(part_lse, 0))
        shift = tl.where(top == -float("inf"), 0.0, top)
        weight = _exp(part_lse - shift)
        shrink = _exp(before - shift)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
    acc *= tl.where(total == 0, 0.0, 1.0 / total)
    total = tl.where(total == 0, -float("inf"), top + tl.log(total))
    at = ((batch.to(tl.int64) * queries + query) * heads + head) * width
    tl.store(out + at + cols, acc.to(out.dtype.element_ty), mask=cols < width)
    tl.store(lse + index, total)


def forward(
    q, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale, scale, left, softcap, alibi_slopes
):
    """(out, lse) of the raw op fastlm::decode_attention."""
    q, k, v = readable_rows(q), readable_rows(k_cache), readable_rows(v_cache)
    lengths = kv_lengths.contiguous()
    table = None if block_table is None else block_table.contiguous()
    batch, heads, queries, dim = q.shape
    pages, kv_heads, page, value_dim = v.shape
    token, device, rows = heads * value_dim, q.device, batch * heads * queries
    strides = (queries * token, value_dim, token, 1)
    out = torch.empty_strided((batch, heads, queries, value_dim), strides, dtype=q.dtype, device=device)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    if rows * value_dim == 0:
        return out, lse

    group = heads // kv_heads
    per_sequence = 1 if table is None else table.shape[1]
    capacity, left = min(page * per_sequence, _FAR), _FAR if left < 0 else min(left, _FAR)
    block_d, block_v = max(16, next_power_of_2(dim)), max(16, next_power_of_2(value_dim))
    sizes = (q.element_size(), k.element_size(), table is not None, group * queries, max(block_d, block_v))
    (block_m, block_n), warps, stages = config_for(split_config, device, *sizes)
    tiles = cdiv(group * queries, block_m)
    splits = splits_of(arch_of(device), batch * kv_heads * tiles, min(capacity, left + queries))
    parts = None
    if splits > 1:
        parts = q.new_empty((rows * splits * (value_dim + 1),), dtype=torch.float32)
    unit, strides = strides_in_units(q, k, v)
    launch(
        split_kernel, (batch * kv_heads, splits, tiles),
        q, k, v, lengths, table, k_scale, v_scale, alibi_slopes, out, lse, parts,
        *strides, *scale_strides(k_scale), *scale_strides(v_scale),
        *((0, 0) if alibi_slopes is None else alibi_slopes.stride()), per_sequence,
        rows, kv_heads, group, queries, dim // unit, value_dim // unit, pages, page, capacity, splits,
        scale, left, softcap if softcap > 0 else None,
        unit, block_m, block_n, block_d, block_v, dot_kind(q.dtype), num_warps=warps, num_stages=stages,
        maxnreg=255,  # or ptxas spills to fit more than the two blocks an SM that splits_of counts on
    )  # fmt: skip
    if parts is not None:
        (block_s,), warps, _ = config_for(merge_config, device, block_v)
        launch(
            merge_kernel, (rows,),
            parts, lengths, out, lse, rows, heads, queries, value_dim // unit, capacity, splits, left,
            unit, block_n, block_s, block_v, num_warps=warps,
        )  # fmt: skip
    return out, lse
