"""append_kv: token s of sequence b goes to slot lengths[b] + s of the cache, or nowhere where there is none.

Quantised: scale = max|x| / 127 of each token and head, q = rint(x / scale), half to even; q = 0 where scale
is 0, infinite or NaN. A program takes rows (one token of one head each) of keys and of values, in registers.
Bound by bytes: k and v are read once and written once. Lengths and page numbers are looked at on the device:
a number outside its range drops the token, and nothing is written. Strides and widths come in units of UNIT
elements, 16 bytes or one. Source: Kwon et al., "PagedAttention", https://arxiv.org/abs/2309.06180.
"""

import torch
import triton
import triton.language as tl

from ._config import Config, cdiv, config_for, next_power_of_2
from ._kv_cache import readable_rows, scale_strides, strides_in_units
from ._launch import launch

_SCALARS = (  # arguments whose values say nothing about how to compile
    *("k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "kc_b", "kc_h", "kc_s", "vc_b", "vc_h", "vc_s"),
    *("ks_b", "ks_h", "ks_s", "vs_b", "vs_h", "vs_s", "table_b"),
    *("rows", "kv_heads", "tokens", "dim", "value_dim", "pages", "page", "capacity"),
)


def append_config(arch: int, dim: int) -> Config:
    """block: rows. dim: columns padded."""
    return Config((max(1, 2048 // dim),))  # 16 numbers a thread: two 16-byte accesses of a half


@triton.jit
def _append(source, source_at, cache, cache_at, scales, scales_at, inside, width, BLOCK: tl.constexpr):
    """Copies or quantises rows: source_at, cache_at and scales_at say where each begins."""
    cols = tl.arange(0, BLOCK)
    mask = inside[:, None] & (cols < width)
    x = tl.load(source + source_at[:, None] + cols, mask=mask, other=0.0)
    if scales is not None:
        x = x.to(tl.float32)
        top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # among bit patterns NaN is the largest
        scale = tl.div_rn(top.to(tl.float32, bitcast=True), 127.0)
        usable = (scale > 0) & (scale < float("inf"))
        x = tl.div_rn(x, tl.where(usable, scale, 1.0)[:, None])
        x = tl.where(usable[:, None], x + 12582912.0 - 12582912.0, 0.0).to(
            tl.int32
        )  # 1.5 * 2^23: half to even
        tl.store(scales + scales_at, scale, mask=inside)
    tl.store(cache + cache_at[:, None] + cols, x.to(cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SCALARS)
def append_kernel(
    k, v, k_cache, v_cache, k_scale, v_scale, lengths, table,
    k_b, k_h, k_s, v_b, v_h, v_s, kc_b, kc_h, kc_s, vc_b, vc_h, vc_s, ks_b, ks_h, ks_s, vs_b, vs_h, vs_s,
    table_b, rows, kv_heads, tokens, dim, value_dim, pages, page, capacity,
    UNIT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Program: BR rows of [batch, kv_heads, tokens]."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < rows
    token, head, batch = row % tokens, row // tokens % kv_heads, row // tokens // kv_heads
    position = tl.load(lengths + batch, mask=inside, other=-1) + token
    inside &= (position >= 0) & (position < capacity)
    if table is None:
        number, slot = batch, position
    else:
        entry = table + batch * table_b + position // page
        number = tl.load(entry, mask=inside, other=-1).to(tl.int64)
        inside &= (number >= 0) & (number < pages)
        slot = position % page
    source_at = (batch * k_b + head * k_h + token * k_s) * UNIT
    cache_at = (number * kc_b + head * kc_h + slot * kc_s) * UNIT
    scales_at = number * ks_b + head * ks_h + slot * ks_s
    _append(k, source_at, k_cache, cache_at, k_scale, scales_at, inside, dim * UNIT, BD)
    source_at = (batch * v_b + head * v_h + token * v_s) * UNIT
    cache_at = (number * vc_b + head * vc_h + slot * vc_s) * UNIT
    scales_at = number * vs_b + head * vs_h + slot * vs_s
    _append(v, source_at, v_cache, cache_at, v_scale, scales_at, inside, value_dim * UNIT, BV)


def forward(k, v, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale):
    """The raw op fastlm::append_kv: writes into the caches and their scales."""
    written = [t for t in (k_cache, v_cache, k_scale, v_scale) if t is not None]
    torch.autograd.graph.increment_version(
        written
    )  # what autograd saved of a cache must not be used any more
    k, v, lengths = readable_rows(k), readable_rows(v), kv_lengths.contiguous()
    table = None if block_table is None else block_table.contiguous()
    batch, kv_heads, tokens, dim = k.shape
    pages, _, page, value_dim = v_cache.shape
    rows = batch * kv_heads * tokens
    if rows == 0:
        return
    per_sequence = 1 if table is None else table.shape[1]
    unit, strides = strides_in_units(k, v, k_cache, v_cache)
    block_d, block_v = next_power_of_2(dim), next_power_of_2(value_dim)
    (block_r,), warps, _ = config_for(append_config, k.device, max(block_d, block_v))
    launch(
        append_kernel, (cdiv(rows, block_r),),
        k, v, k_cache, v_cache, k_scale, v_scale, lengths, table,
        *strides, *scale_strides(k_scale), *scale_strides(v_scale), per_sequence,
        rows, kv_heads, tokens, dim // unit, value_dim // unit, pages, page, page * per_sequence,
        unit, block_r, block_d, block_v, num_warps=warps,
    )  # fmt: skip
