"""decode_attention: out = softmax(scale * q k^T + alibi, over the keys that a query may attend to) v.

Of sequence b, with n = lengths[b] and off = n - queries, query i attends to the keys j <= i + off, j < n and
j >= i + off - left; csrc/contract/decode_attention.h has the rest. Bound by the bytes of the cache: its floor
is the keys and values in reach, read once, and below some 300 rows a kv head no GPU computes longer than it
reads. So a program takes all rows (the query heads that share a kv head, times the queries: r = head * queries
+ query) against one split of the keys: scores and softmax stay in registers, keys and values come through
shared memory. How many splits there are is chosen from shapes alone, so that nothing waits for the lengths
and a CUDA graph may replay the launch with others; how long they are, from the length, on the device. A split
without keys writes nothing and is not read; a second kernel merges the others, one row a program.

Sources: Dao et al., "Flash-Decoding", https://pytorch.org/blog/flash-decoding; Kwon et al., "PagedAttention",
https://arxiv.org/abs/2309.06180.
"""

import torch
import triton
import triton.language as tl

from ._attention import LOG2E, _tanh
from ._config import Config, arch_of, config_for
from ._matmul import dot_kind

_FAR = 1 << 30  # keys before a query: farther than any cache is long


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
    return max(1, min(wave, 128, triton.cdiv(keys, 128)))  # less than 128 keys do not fill the pipeline


def merge_config(arch: int, value_dim: int) -> Config:
    """block: splits read at a time. value_dim: columns padded."""
    return Config((max(1, 4096 // value_dim),), warps=4, stages=1)  # 32 numbers a thread


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)  # of a difference: exact for keys whose scores are near the largest


@triton.jit
def _dot(x, y, acc, PRECISION: tl.constexpr):
    """x @ y + acc. An int8 y is exact in any half; a float32 x is then, exactly, a sum of three bfloat16."""
    if PRECISION == "half":
        return tl.dot(x, y.to(x.dtype), acc)
    if y.dtype != tl.int8:
        return tl.dot(x, y, acc, input_precision=PRECISION)
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    low = (x - middle.to(tl.float32)).to(tl.bfloat16)
    y = y.to(tl.bfloat16)
    return tl.dot(high, y, tl.dot(middle, y, tl.dot(low, y, acc)))


@triton.jit
def _keys_in_reach(lengths, batch, capacity, queries, left, splits, BLOCK_N: tl.constexpr):
    """The keys [first, end) that a sequence's queries reach, and how many of them a split takes."""
    end = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), capacity)
    first = tl.maximum(end - queries - left, 0)
    return first, end, tl.cdiv(tl.cdiv(end - first, splits), BLOCK_N) * BLOCK_N


@triton.jit
def _row_index(batch, kv_head, r, kv_heads, group, queries):
    """Row r's query head and query, and where it lies in [batch, heads, queries]."""
    head = kv_head * group + r // queries
    query = r % queries
    return head, query, (batch * (kv_heads * group) + head) * queries + query


@triton.jit
def _store(out, lse, index, batch, head, query, heads, queries, value_dim, inside, cols, value, total):
    at = ((batch * queries + query) * heads + head) * value_dim
    at = out + at[:, None] + cols
    tl.store(at, value.to(out.dtype.element_ty), mask=inside[:, None] & (cols < value_dim))
    tl.store(lse + index, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "pages", "capacity", "splits", "left"])
def _split_kernel(
    q,
    k,
    v,
    lengths,
    table,
    k_scale,
    v_scale,
    slopes,
    out,
    lse,
    parts,
    q_at,
    k_at,
    v_at,
    k_scale_at,
    v_scale_at,
    slopes_at,
    table_at,
    rows,
    kv_heads,
    group,
    queries,
    dim,
    value_dim,
    pages,
    page,
    capacity,
    splits,
    scale,
    left,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    split = tl.program_id(1)
    first, n, share = _keys_in_reach(lengths, batch, capacity, queries, left, splits, BLOCK_N)
    begin = first + split * share
    end = tl.minimum(begin + share, n)
    if parts is not None:
        if begin >= end:
            return

    r = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, query, index = _row_index(batch, kv_head, r, kv_heads, group, queries)
    inside = r < group * queries
    own = query + (n - queries)
    cols = tl.arange(0, BLOCK_D)
    value_cols = tl.arange(0, BLOCK_V)
    start = batch * q_at[0] + head * q_at[1] + query * q_at[2]
    q_tile = tl.load(q + start[:, None] + cols, mask=inside[:, None] & (cols < dim), other=0.0)
    k += kv_head * k_at[1] + cols
    v += kv_head * v_at[1] + value_cols
    if slopes is not None:
        slope = tl.load(slopes + batch * slopes_at[0] + head * slopes_at[1], mask=inside, other=0.0)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for j in tl.range(begin, end, BLOCK_N):
        t = j + tl.arange(0, BLOCK_N)
        present = t < end  # slots from the length on are never read
        if table is None:
            number, slot = batch, t.to(tl.int64)
        else:
            number = tl.load(table + batch * table_at + t // page, mask=present, other=0).to(tl.int64)
            number = tl.where((number >= 0) & (number < pages), number, 0)  # no such page: the first instead
            slot = (t % page).to(tl.int64)
        k_tile = tl.load(
            k + (number * k_at[0] + slot * k_at[2])[:, None],
            mask=present[:, None] & (cols < dim),
            other=0.0 if k_scale is None else 0,
        )
        s = _dot(q_tile, tl.trans(k_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        if k_scale is not None:
            at = number * k_scale_at[0] + kv_head * k_scale_at[1] + slot * k_scale_at[2]
            s *= tl.load(k_scale + at, mask=present, other=0.0)
        s *= scale
        if softcap is not None:
            s = softcap * _tanh(s / softcap)
        if slopes is not None:
            s -= slope[:, None] * (own[:, None] - t).to(tl.float32)

        keep = (t <= own[:, None]) & (t >= own[:, None] - left)
        before = top
        top = tl.maximum(top, tl.max(tl.where(keep, s, -float("inf")), 1))
        shift = tl.where(top == -float("inf"), 0.0, top)
        p = tl.where(keep, _exp(s - shift[:, None]), 0.0)
        shrink = _exp(before - shift)
        total = total * shrink + tl.sum(p, 1)

        v_tile = tl.load(
            v + (number * v_at[0] + slot * v_at[2])[:, None],
            mask=present[:, None] & (value_cols < value_dim),
            other=0.0 if v_scale is None else 0,
        )
        acc *= shrink[:, None]
        if v_scale is None:
            acc = _dot(p.to(q_tile.dtype), v_tile, acc, PRECISION)
        else:
            at = number * v_scale_at[0] + kv_head * v_scale_at[1] + slot * v_scale_at[2]
            v_scales = tl.load(v_scale + at, mask=present, other=0.0)
            unit = tl.max(v_scales, 0)  # the weights stay within [0, 1]: small scales do not vanish in a half
            unit = tl.where(unit == 0, 1.0, unit)
            p = (p * (v_scales / unit)).to(q_tile.dtype)
            acc += _dot(p, v_tile, tl.zeros([BLOCK_M, BLOCK_V], tl.float32), PRECISION) * unit

    acc *= tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    total = tl.where(total == 0, -float("inf"), top + tl.log(total))
    if parts is None:
        heads = kv_heads * group
        _store(out, lse, index, batch, head, query, heads, queries, value_dim, inside, value_cols, acc, total)
    else:
        index = index * splits + split
        at = parts + (index * value_dim)[:, None] + value_cols
        tl.store(at, acc, mask=inside[:, None] & (value_cols < value_dim))
        tl.store(parts + rows.to(tl.int64) * splits * value_dim + index, total, mask=inside)


@triton.jit(do_not_specialize=["capacity", "splits", "left"])
def _merge_kernel(
    parts,
    lengths,
    out,
    lse,
    heads,
    queries,
    value_dim,
    capacity,
    splits,
    left,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    batch, head, query = index // queries // heads, index // queries % heads, index % queries
    first, n, share = _keys_in_reach(lengths, batch, capacity, queries, left, splits, BLOCK_N)
    used = tl.cdiv(n - first, tl.maximum(share, 1))
    row = index * splits
    sums = parts + tl.num_programs(0).to(tl.int64) * splits * value_dim + row
    parts += row * value_dim
    cols = tl.arange(0, BLOCK_V)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_V], tl.float32)
    for s in tl.range(0, used, BLOCK_S):
        split = s + tl.arange(0, BLOCK_S)
        present = split < used
        part_lse = tl.load(sums + split, mask=present, other=-float("inf"))
        at = parts + split[:, None] * value_dim + cols
        part = tl.load(at, mask=present[:, None] & (cols < value_dim), other=0.0)
        before = top
        top = tl.maximum(top, tl.max(part_lse, 0))
        shift = tl.where(top == -float("inf"), 0.0, top)
        weight = _exp(part_lse - shift)
        shrink = _exp(before - shift)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
    acc *= tl.where(total == 0, 0.0, 1.0 / total)
    total = tl.where(total == 0, -float("inf"), top + tl.log(total))
    at = ((batch * queries + query) * heads + head) * value_dim
    tl.store(out + at + cols, acc.to(out.dtype.element_ty), mask=cols < value_dim)
    tl.store(lse + index, total)


def forward(
    q, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale, scale, left, softcap, alibi_slopes
):
    """(out, lse) of the raw op fastlm::decode_attention."""
    q, k, v = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (q, k_cache, v_cache))
    lengths = kv_lengths.contiguous()
    table = None if block_table is None else block_table.contiguous()
    batch, heads, queries, dim = q.shape
    pages, kv_heads, page, value_dim = v.shape
    out = q.new_empty((batch, queries, heads, value_dim))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    if out.numel() == 0:
        return out.transpose(1, 2), lse

    group = heads // kv_heads
    capacity = min(page if table is None else page * table.shape[1], _FAR)
    left = _FAR if left < 0 else min(left, _FAR)
    block_d, block_v = (max(16, triton.next_power_of_2(n)) for n in (dim, value_dim))
    sizes = (q.element_size(), k.element_size(), table is not None, group * queries, max(block_d, block_v))
    config = config_for(split_config, q.device, *sizes)
    block_m, block_n = config.block
    tiles = triton.cdiv(group * queries, block_m)
    splits = splits_of(arch_of(q.device), batch * kv_heads * tiles, min(capacity, left + queries))
    rows = lse.numel()
    parts = None
    if splits > 1:
        parts = q.new_empty((rows * splits * (value_dim + 1),), dtype=torch.float32)
    _split_kernel[(batch * kv_heads, splits, tiles)](
        q,
        k,
        v,
        lengths,
        table,
        k_scale,
        v_scale,
        alibi_slopes,
        out,
        lse,
        parts,
        q.stride()[:3],
        k.stride()[:3],
        v.stride()[:3],
        None if k_scale is None else k_scale.stride(),
        None if v_scale is None else v_scale.stride(),
        None if alibi_slopes is None else alibi_slopes.stride(),
        None if table is None else table.shape[1],
        rows,
        kv_heads,
        group,
        queries,
        dim,
        value_dim,
        pages,
        page,
        capacity,
        splits,
        scale,
        left,
        softcap if softcap > 0 else None,
        block_m,
        block_n,
        block_d,
        block_v,
        dot_kind(q.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=255,  # or ptxas spills to fit more than the two blocks an SM that splits_of counts on
    )
    if parts is not None:
        merge = config_for(merge_config, q.device, block_v)
        _merge_kernel[(rows,)](
            parts,
            lengths,
            out,
            lse,
            heads,
            queries,
            value_dim,
            capacity,
            splits,
            left,
            block_n,
            merge.block[0],
            block_v,
            num_warps=merge.warps,
        )
    return out.transpose(1, 2), lse
