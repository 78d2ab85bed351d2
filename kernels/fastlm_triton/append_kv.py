"""append_kv: token s of sequence b goes to slot lengths[b] + s of the cache, or nowhere where there is none.

Quantised: scale = max|x| / 127 of each token and head, q = rint(x / scale), half to even; q = 0 where scale
is 0, infinite or NaN. A program takes rows (a row is one token of one head) of keys and of values; a row stays
in registers. Bound by bytes: k and v are read once and written once. Lengths and page numbers are looked at on
the device: a number outside its range drops the token, and nothing is written. Source of the pages: Kwon et
al., "PagedAttention", https://arxiv.org/abs/2309.06180.
"""

import torch
import triton
import triton.language as tl

from ._config import Config, config_for


def append_config(arch: int, dim: int) -> Config:
    """block: rows. dim: columns padded."""
    return Config((max(1, 2048 // dim),))  # 16 numbers a thread: two 16-byte accesses of a half


@triton.jit
def _append(source, source_at, cache, cache_at, scales, scales_at, batch, head, token, number, slot, inside, dim,
            BLOCK_D: tl.constexpr):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < dim)
    at = batch * source_at[0] + head * source_at[1] + token * source_at[2]
    x = tl.load(source + at[:, None] + cols, mask=mask, other=0.0)
    if scales is not None:
        x = x.to(tl.float32)
        # among bit patterns NaN is the largest of all
        top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
        scale = tl.div_rn(top, 127.0)
        usable = (scale > 0) & (scale < float("inf"))
        x = tl.div_rn(x, tl.where(usable, scale, 1.0)[:, None])
        x = tl.where(usable[:, None], x + 12582912.0 - 12582912.0, 0.0)  # 1.5 * 2^23 rounds half to even
        x = x.to(tl.int32)
        at = number * scales_at[0] + head * scales_at[1] + slot * scales_at[2]
        tl.store(scales + at, scale, mask=inside)
    at = number * cache_at[0] + head * cache_at[1] + slot * cache_at[2]
    tl.store(cache + at[:, None] + cols, x.to(cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "pages", "capacity"])
def _append_kernel(
    k,
    v,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    lengths,
    table,
    k_at,
    v_at,
    k_cache_at,
    v_cache_at,
    k_scale_at,
    v_scale_at,
    table_at,
    rows,
    kv_heads,
    tokens,
    dim,
    value_dim,
    pages,
    page,
    capacity,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    token = row % tokens
    head = row // tokens % kv_heads
    batch = row // tokens // kv_heads
    position = tl.load(lengths + batch, mask=inside, other=-1) + token
    inside &= (position >= 0) & (position < capacity)
    if table is None:
        number, slot = batch, position
    else:
        entry = table + batch * table_at + position // page
        number = tl.load(entry, mask=inside, other=-1).to(tl.int64)
        inside &= (number >= 0) & (number < pages)
        slot = position % page
    _append(k, k_at, k_cache, k_cache_at, k_scale, k_scale_at, batch, head, token, number, slot, inside, dim, BLOCK_D)  # fmt: skip
    _append(v, v_at, v_cache, v_cache_at, v_scale, v_scale_at, batch, head, token, number, slot, inside, value_dim, BLOCK_V)  # fmt: skip


def forward(k, v, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale):
    """The raw op fastlm::append_kv: writes into the caches and their scales."""
    written = [t for t in (k_cache, v_cache, k_scale, v_scale) if t is not None]
    torch.autograd.graph.increment_version(written)  # autograd must see that a saved cache is another now
    k, v = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (k, v))
    lengths = kv_lengths.contiguous()
    table = None if block_table is None else block_table.contiguous()
    batch, kv_heads, tokens, dim = k.shape
    pages, _, page, value_dim = v_cache.shape
    rows = batch * kv_heads * tokens
    if rows == 0:
        return
    block_d, block_v = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    config = config_for(append_config, k.device, max(block_d, block_v))
    _append_kernel[(triton.cdiv(rows, config.block[0]),)](
        k,
        v,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        lengths,
        table,
        k.stride()[:3],
        v.stride()[:3],
        k_cache.stride()[:3],
        v_cache.stride()[:3],
        None if k_scale is None else k_scale.stride(),
        None if v_scale is None else v_scale.stride(),
        None if table is None else table.shape[1],
        rows,
        kv_heads,
        tokens,
        dim,
        value_dim,
        pages,
        page,
        page if table is None else page * table.shape[1],
        config.block[0],
        block_d,
        block_v,
        num_warps=config.warps,
    )
