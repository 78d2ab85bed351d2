"""The backward kernels of attention, dense and packed: an element has one writer, so no sum needs atomics.

With dp_ij = dout_i . v_j (dropped as p was), delta_i = sum_j p_ij dp_ij = dout_i . out_i:
ds_ij = p_ij (dp_ij - delta_i + dlse_i); through softcap times 1 - tanh^2; dq_i = scale * sum_j ds_ij k_j;
dk_j = scale * sum_i ds_ij q_i; dv_j = sum_i p_ij dout_i; dbias = ds, summed where bias is broadcast.

_dq_kernel: BM queries of a head; first delta, kept for the others, then keys as in forward. _dkv_kernel: BN
keys of a key head; the queries that see them, of all query heads that read it. _dbias_kernel: a tile of bias;
the batch entries and heads that it is broadcast to. p is computed anew in each. Bound: 14 * dim FLOPs a pair,
where one kernel with atomics has 10; with EXACT 18: then delta and the sum of p come from the very dp and
scores that they meet, because delta from a rounded out is too coarse for float32 gradients (one key: ds must
be 0, not rounding). q, k, v and dout are read as in forward, from either side.
Source: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import (
    LIGHT,
    SCALARS,
    Problem,
    dropped_keys,
    has_100_kb,
    head_of,
    hide,
    in_log2,
    load_rows,
    owned_rows,
    scores_of,
    sequence_of,
    store_rows,
    survivors,
    survivors_of_keys,
    zero_gaps,
)
from ._config import Config, config_for
from ._launch import launch
from ._matmul import add_product


def _is_crowded(options: str) -> bool:
    """Whether a score has so much beside it that small tiles spill."""
    return "dropout" in options and ("mask" in options or "bias" in options)


def dq_config(arch: int, dtype: torch.dtype, width: int, queries: int, options: str) -> Config:
    """Queries of a tile, and keys of a step; registers as ptxas counts them, none spilled.

    options: Problem.options. What is measured was so on an H200, causal, in bfloat16: 16 heads of 64 over 8
    times 2048 tokens, 32 heads of 128 over 8192, the best of 9 to 16 configurations (docs/decisions.md).
    """
    alone = width > 128 and has_100_kb(arch)  # 66 KB: one program at a time, which has to have the warps
    if dtype == torch.float32:
        return Config((16, 16), 8 if alone else 4, 2)  # 109 registers; 32 x 16 and 32 x 32 spill somewhere
    if alone:
        return Config((32, 32), 8, 2)  # 142 registers
    if width <= 64 and _is_crowded(options):
        return Config((64, 32), 8, 2)  # 254 registers; 97 spills of 128 queries
    if queries <= 64:
        return Config((64, 32), 4 if width <= 128 else 8, 2)  # short: half a tile of 128 would be idle
    if width <= 64:
        if arch == 90 and options in LIGHT:  # measured: 252 us, of 128 queries 454
            return Config((64, 64), 4, 3)
        if arch == 90 and options in ("dropout", "alibi dropout", "dropout packed"):
            return Config((64, 64), 4, 2)  # not measured, but near it; 191 to 233 registers: two at a time
        if arch == 90 or options in LIGHT and not has_100_kb(arch):
            return Config((128, 64), 8, 2)  # 194 registers on sm_90, else 255
        return Config((128, 32), 8, 2)  # 250 registers; up to 71 spills of 64 keys
    if arch == 90:  # wgmma reads q and dout from shared memory, so registers are left: 178, 194
        if width > 128:
            return Config((64, 64), 8, 2)
        return Config((128, 64), 8, 3 if options in LIGHT else 2)  # measured: 1.6 ms, of 2 stages 2.0
    return Config(
        (64, 64 if width <= 128 else 32), 8, 2
    )  # 162 and 200 registers; with 128 queries they spill


def dkv_config(arch: int, dtype: torch.dtype, width: int, keys: int, options: str) -> Config:
    """Queries of a step, and keys of a tile; registers as ptxas counts them, none spilled.

    options: Problem.options. Measured: as for dq_config.
    """
    if dtype == torch.float32:
        if 64 < width <= 128 and "packed" in options:
            return Config((16, 16), 4, 2)  # 168 registers, where 32 x 32 spill a few
        return Config((32, 32) if width <= 128 else (16, 16), 8, 2)  # with 4 warps 32 x 32 spill
    if width > 128:
        if has_100_kb(arch):
            return Config((32, 32), 8, 2)  # 161 registers, 66 KB
        if arch == 90 and "softcap" in options:
            return Config((16, 64), 8, 2)  # 255 registers, where 32 queries spill 2
        return Config((32, 64), 8, 2)  # 246 registers, 100 KB
    if width <= 64 and _is_crowded(options):
        if arch in (90, 100):  # their matrix units take 64 rows or more
            return Config((64, 64), 8, 2)  # 246 registers
        return Config((32, 32), 4, 2)  # 242 registers
    if keys <= 64:  # short: half a tile of 128 would be idle
        few = width <= 64 and options not in LIGHT and arch not in (80, 90)  # 5 to 35 spills of 32 queries
        return Config((16 if few else 32, 64), 4 if width <= 64 else 8, 2)
    if width <= 64:
        if arch == 90 and options in ("", "packed"):  # measured: 392 us, of 128 keys 616, though 15 spill
            return Config((128, 64), 4, 2)
        if arch == 90 and options in ("dropout", "alibi dropout"):
            return Config((64, 64), 4, 2)  # not measured; 240, 252 registers, where 128 queries spill 10
        if arch == 90 and "softcap" in options and "dropout" in options:
            return Config((32, 128), 8, 2)  # 211 registers, where 64 queries spill 6
        if arch == 90:
            return Config((64, 128), 8, 2)  # 255 registers
        if "dropout" in options or "bias" in options and has_100_kb(arch):
            return Config((16, 128), 8, 2)  # 234 registers; up to 28 spills of 32 queries
        return Config((32, 128), 8, 2)  # 216 to 251 registers; 64 queries: spilled
    if arch == 90 and options == "":  # measured: 2.7 ms, of 32 queries 3.3, though 22 spill before the loop
        return Config((64, 128), 8, 1)
    if arch == 90:
        return Config((32, 128), 8, 2)  # 222 registers
    if options and has_100_kb(arch):
        return Config((32, 64), 8, 2)  # 220 registers, where 64 queries of packed sequences spill 37
    return Config((64, 64), 8, 2)  # 169 registers


def dbias_config(arch: int, dtype: torch.dtype, width: int, options: str) -> Config:
    """Queries and keys of a tile; a step loads q, k, v and dout, so they are rarely loaded ahead.

    options: Problem.options.
    """
    if width > 128:
        return Config((32, 32) if dtype != torch.float32 else (16, 16), 4, 1)
    if dtype == torch.float32:
        return Config((32, 32), 8, 1)  # 140 registers; 15 spills with 4 warps
    if width <= 64:
        return Config(
            (64, 32), 8 if _is_crowded(options) else 4, 2
        )  # 250, 255 registers; 50 spills of 64 keys
    return Config((64, 64), 8, 1)


@triton.jit
def _row_sums(a, b):
    """Sums of a * b along rows; the products are rounded: fused into sums over lanes, lanes would differ."""
    return tl.sum(tl.fma(a, b, 0.0), 1)


@triton.jit
def _weights_of(
    qk, base, norm, i, j, i0, i1, j0, j1, nq, nk, low, high, factor, cap, shift, slope,
    bias, bias_q, bias_k, mask, mask_q, mask_k, RAW: tl.constexpr,
):  # fmt: skip
    """(p, tanh): exp2(scores - base) * norm, if there is one, the softmax's weights; 0 where not seen."""
    s, bent = scores_of(qk, i, j, nq, nk, factor, cap, shift, slope, bias, bias_q, bias_k, RAW)
    if RAW:
        s *= factor
    p = tl.exp2(s - base)
    if norm is not None:
        p *= norm
    return hide(p, 0.0, i, j, i0, i1, j0, j1, nq, nk, low, high, mask, mask_q, mask_k), bent


@triton.jit(do_not_specialize=SCALARS)
def _dq_kernel(
    q, k, v, mask, bias, lengths, starts_q, starts_k, slopes, seed,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
    heads, group, batch, queries, keys, tokens_q, tokens_k, dim, dim_v, offset, left, right,
    factor, cap, scale, threshold, survivor_scale,
    dout, do_b, do_h, do_s, stats, stat_size,
    out, lse, dlse, dlse_b, dlse_h, dlse_s, has_dlse, dq, needs_dq,
    RAW: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles, pid = tl.cdiv(queries, BM), tl.program_id(0)
    tile, h, b = (
        tiles - 1 - pid % tiles,
        pid // tiles % heads,
        pid // tiles // heads,
    )  # the longest rows first
    first_q, nq, first_k, nk, low, high = sequence_of(
        b, queries, keys, tokens_q, tokens_k, lengths, starts_q, starts_k, offset, left, right
    )
    PACKED: tl.constexpr = starts_q is not None
    d, e, r = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BM)
    width, width_v = dim * UNIT, dim_v * UNIT
    dq_s, out_s = heads.to(tl.int64) * width, heads.to(tl.int64) * width_v
    dq += h.to(tl.int64) * width
    if PACKED:
        if (tile == 0) & (needs_dq != 0):
            begin, end = owned_rows(starts_q, b, batch, first_q, tokens_q)
            zero_gaps(dq, dq_s, first_q, nq, begin, end, d, width, BM, EVEN)
    if tile * BM >= nq:
        return

    i0, i = tile * BM, tile * BM + r
    q, q_s = head_of(q, b, h, first_q, q_b, q_h, q_s, UNIT, PACKED)
    k, k_s = head_of(k, b, h // group, first_k, k_b, k_h, k_s, UNIT, PACKED)
    v, v_s = head_of(v, b, h // group, first_k, v_b, v_h, v_s, UNIT, PACKED)
    dout, do_s = head_of(dout, b, h, first_q, do_b, do_h, do_s, UNIT, PACKED)
    slope = None
    if slopes is not None:
        slope = in_log2(tl.load(slopes + b.to(tl.int64) * slopes_b + h.to(tl.int64) * slopes_h))
    if mask is not None:
        mask += b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h
    if bias is not None:
        bias += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    q_tile = load_rows(q, q_s, i, d, nq, width, EVEN)
    do_tile = load_rows(dout, do_s, i, e, nq, width_v, EVEN)
    begin = tl.maximum(0, i0 + low) // BN * BN
    end = tl.minimum(nk, tl.minimum(i0 + BM, nq) + high)

    norm = None
    if EXACT:
        top = tl.full([BM], float("-inf"), tl.float32)
        total, mixed = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        for j0 in tl.range(begin, end, BN, num_stages=STAGES):
            j = j0 + tl.arange(0, BN)
            k_tile = load_rows(k, k_s, j, d, nk, width, EVEN)
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            s, _ = scores_of(
                qk,
                i[:, None],
                j[None, :],
                nq,
                nk,
                factor,
                cap,
                low + left,
                slope,
                bias,
                bias_q,
                bias_k,
                False,
            )
            s = hide(
                s, float("-inf"), i[:, None], j[None, :], i0, i0 + BM - 1, j0, j0 + BN - 1, nq, nk, low, high,
                mask, mask_q, mask_k,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(s, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            v_tile = load_rows(v, v_s, j, e, nk, width_v, EVEN)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
            if seed is not None:
                kept = survivors(seed, i, j0, b * heads + h, threshold, BN, PAIRS)
                dp = tl.where(kept, dp * survivor_scale, 0.0)
            total, mixed, top = total * shrink + tl.sum(p, 1), mixed * shrink + _row_sums(p, dp), higher
        empty = total == 0
        base = tl.where(empty, float("inf"), top)  # of an empty row every weight is 0
        inverse = tl.where(empty, 0.0, tl.div_rn(1.0, total))
        delta = tl.where(empty, 0.0, tl.div_rn(mixed, total))
        norm = inverse[:, None]
    else:
        out += first_q * out_s + h.to(tl.int64) * width_v
        out_tile = load_rows(out, out_s, i, e, nq, width_v, EVEN)
        delta = _row_sums(out_tile.to(tl.float32), do_tile.to(tl.float32))
        at = (h.to(tl.int64) * tokens_q + first_q) if PACKED else (b.to(tl.int64) * heads + h) * queries
        base = in_log2(tl.load(lse + at + i, mask=i < nq, other=float("-inf")))
        base = tl.where(base == float("-inf"), float("inf"), base)
    at = (first_q + i) * dlse_s.to(tl.int64) if PACKED else i * dlse_s.to(tl.int64) + b.to(tl.int64) * dlse_b
    delta -= tl.load(dlse + h.to(tl.int64) * dlse_h + at, mask=(i < nq) & (has_dlse != 0), other=0.0)
    stats += (h.to(tl.int64) * tokens_q + first_q) if PACKED else (b.to(tl.int64) * heads + h) * queries
    tl.store(stats + i, base, mask=i < nq)
    tl.store(stats + stat_size + i, delta, mask=i < nq)
    if EXACT:
        tl.store(stats + 2 * stat_size + i, inverse, mask=i < nq)

    acc = tl.zeros([BM, BD], tl.float32)
    end = tl.where(needs_dq != 0, end, begin)
    for j0 in tl.range(begin, end, BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        k_tile = load_rows(k, k_s, j, d, nk, width, EVEN)
        v_tile = load_rows(v, v_s, j, e, nk, width_v, EVEN)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        p, bent = _weights_of(
            qk, base[:, None], norm, i[:, None], j[None, :], i0, i0 + BM - 1, j0, j0 + BN - 1, nq, nk, low,
            high, factor, cap, low + left, slope, bias, bias_q, bias_k, mask, mask_q, mask_k, RAW,
        )  # fmt: skip
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        if seed is not None:
            kept = survivors(seed, i, j0, b * heads + h, threshold, BN, PAIRS)
            dp = tl.where(kept, dp * survivor_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if cap is not None:
            ds *= 1.0 - bent * bent
        acc = add_product(acc, ds.to(k_tile.dtype), k_tile, PRECISION)
    store_rows(dq + first_q * dq_s, dq_s, i, d, nq * needs_dq, width, acc * scale, EVEN)


@triton.jit(do_not_specialize=SCALARS)
def _dkv_kernel(
    q, k, v, mask, bias, lengths, starts_q, starts_k, slopes, seed,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
    heads, group, batch, queries, keys, tokens_q, tokens_k, dim, dim_v, offset, left, right,
    factor, cap, scale, threshold, survivor_scale,
    dout, do_b, do_h, do_s, stats, stat_size,
    dk, dv, needs_dk, needs_dv,
    RAW: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles, pid, kv_heads = tl.cdiv(keys, BN), tl.program_id(0), heads // group
    tile, kv_head, b = pid % tiles, pid // tiles % kv_heads, pid // tiles // kv_heads
    first_q, nq, first_k, nk, low, high = sequence_of(
        b, queries, keys, tokens_q, tokens_k, lengths, starts_q, starts_k, offset, left, right
    )
    PACKED: tl.constexpr = starts_q is not None
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    width, width_v = dim * UNIT, dim_v * UNIT
    dk_s, dv_s = kv_heads.to(tl.int64) * width, kv_heads.to(tl.int64) * width_v
    dk += kv_head.to(tl.int64) * width
    dv += kv_head.to(tl.int64) * width_v
    written = keys
    if PACKED:
        written = nk
        if tile == 0:
            begin, end = owned_rows(starts_k, b, batch, first_k, tokens_k)
            zero_gaps(dk, dk_s, first_k, nk, begin, end * needs_dk, d, width, BN, EVEN)
            zero_gaps(dv, dv_s, first_k, nk, begin, end * needs_dv, e, width_v, BN, EVEN)
    if tile * BN >= written:
        return

    j0, j = tile * BN, tile * BN + tl.arange(0, BN)
    if seed is not None:  # in the order of survivors_of_keys; whatever has to do with keys goes by j
        j = j0 + dropped_keys(BN, PAIRS)
    k, k_s = head_of(k, b, kv_head, first_k, k_b, k_h, k_s, UNIT, PACKED)
    v, v_s = head_of(v, b, kv_head, first_k, v_b, v_h, v_s, UNIT, PACKED)
    k_tile = load_rows(k, k_s, j, d, nk, width, EVEN)
    v_tile = load_rows(v, v_s, j, e, nk, width_v, EVEN)
    dk_acc, dv_acc = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BV], tl.float32)

    begin = tl.maximum(0, j0 - high) // BM * BM
    end = tl.where(j0 < nk, tl.minimum(nq, tl.minimum(j0 + BN, nk) - low), 0)
    steps = tl.maximum(0, tl.cdiv(end - begin, BM))
    for step in tl.range(0, steps * group, num_stages=STAGES):
        h, i0 = kv_head * group + step // steps, begin + step % steps * BM
        i = i0 + tl.arange(0, BM)
        q_head, q_row = head_of(q, b, h, first_q, q_b, q_h, q_s, UNIT, PACKED)
        do_head, do_row = head_of(dout, b, h, first_q, do_b, do_h, do_s, UNIT, PACKED)
        slope = None
        if slopes is not None:
            slope = in_log2(tl.load(slopes + b.to(tl.int64) * slopes_b + h.to(tl.int64) * slopes_h))
        mask_head, bias_head = mask, bias
        if mask is not None:
            mask_head = mask + b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h
        if bias is not None:
            bias_head = bias + b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
        q_tile = load_rows(q_head, q_row, i, d, nq, width, EVEN)
        at = stats + (
            (h.to(tl.int64) * tokens_q + first_q) if PACKED else (b.to(tl.int64) * heads + h) * queries
        )
        base = tl.load(at + i, mask=i < nq, other=float("inf"))
        norm = None
        if EXACT:
            norm = tl.load(at + 2 * stat_size + i, mask=i < nq, other=0.0)[None, :]
        qk = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        p, bent = _weights_of(
            qk, base[None, :], norm, i[None, :], j[:, None], i0, i0 + BM - 1, j0, j0 + BN - 1, nq, nk, low,
            high, factor, cap, low + left, slope, bias_head, bias_q, bias_k, mask_head, mask_q, mask_k, RAW,
        )  # fmt: skip
        do_tile = load_rows(do_head, do_row, i, e, nq, width_v, EVEN)
        dropped = p
        if seed is not None:
            kept = survivors_of_keys(seed, i, j0, b * heads + h, threshold, BN, PAIRS)
            dropped = tl.where(kept, p * survivor_scale, 0.0)
        dv_acc = add_product(dv_acc, dropped.to(do_tile.dtype), do_tile, PRECISION)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        if seed is not None:
            dp = tl.where(kept, dp * survivor_scale, 0.0)
        delta = tl.load(at + stat_size + i, mask=i < nq, other=0.0)
        ds = p * (dp - delta[None, :])
        if cap is not None:
            ds *= 1.0 - bent * bent
        dk_acc = add_product(dk_acc, ds.to(q_tile.dtype), q_tile, PRECISION)
    store_rows(dk + first_k * dk_s, dk_s, j, d, written * needs_dk, width, dk_acc * scale, EVEN)
    store_rows(dv + first_k * dv_s, dv_s, j, e, written * needs_dv, width_v, dv_acc, EVEN)


@triton.jit(do_not_specialize=SCALARS)
def _dbias_kernel(
    q, k, v, mask, bias, lengths, starts_q, starts_k, slopes, seed,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
    heads, group, batch, queries, keys, tokens_q, tokens_k, dim, dim_v, offset, left, right,
    factor, cap, scale, threshold, survivor_scale,
    dout, do_b, do_h, do_s, stats, stat_size,
    parts, kept_b, kept_h, splits,
    RAW: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles_q, tiles_k, pid = tl.cdiv(queries, BM), tl.cdiv(keys, BN), tl.program_id(0)
    tile_k, tile_q, owner = pid % tiles_k, pid // tiles_k % tiles_q, pid // tiles_k // tiles_q
    own_h, own_b, split = owner % kept_h, owner // kept_h % kept_b, owner // kept_h // kept_b
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    width, width_v = dim * UNIT, dim_v * UNIT
    i0, j0 = tile_q * BM, tile_k * BN
    i, j = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN)
    low, high = offset - left, offset + right
    over_h, acc = heads // kept_h, tl.zeros([BM, BN], tl.float32)
    seen = (j0 - (i0 + BM - 1) <= high) & (j0 + BN - 1 - i0 >= low)
    for step in tl.range(split, tl.where(seen, batch // kept_b * over_h, 0), splits, num_stages=STAGES):
        b, h = own_b + step // over_h, own_h + step % over_h
        nk = keys
        if lengths is not None:
            nk = tl.maximum(0, tl.minimum(keys, tl.load(lengths + b)))
        q_head, q_row = head_of(q, b, h, 0, q_b, q_h, q_s, UNIT, False)
        k_head, k_row = head_of(k, b, h // group, 0, k_b, k_h, k_s, UNIT, False)
        v_head, v_row = head_of(v, b, h // group, 0, v_b, v_h, v_s, UNIT, False)
        do_head, do_row = head_of(dout, b, h, 0, do_b, do_h, do_s, UNIT, False)
        slope = None
        if slopes is not None:
            slope = in_log2(tl.load(slopes + b.to(tl.int64) * slopes_b + h.to(tl.int64) * slopes_h))
        mask_head = mask
        if mask is not None:
            mask_head = mask + b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h
        bias_head = bias + b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
        q_tile = load_rows(q_head, q_row, i, d, queries, width, EVEN)
        k_tile = load_rows(k_head, k_row, j, d, nk, width, EVEN)
        v_tile = load_rows(v_head, v_row, j, e, nk, width_v, EVEN)
        do_tile = load_rows(do_head, do_row, i, e, queries, width_v, EVEN)
        at = stats + (b.to(tl.int64) * heads + h) * queries
        base = tl.load(at + i, mask=i < queries, other=float("inf"))
        delta = tl.load(at + stat_size + i, mask=i < queries, other=0.0)
        norm = None
        if EXACT:
            norm = tl.load(at + 2 * stat_size + i, mask=i < queries, other=0.0)[:, None]
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        p, _ = _weights_of(
            qk, base[:, None], norm, i[:, None], j[None, :], i0, i0 + BM - 1, j0, j0 + BN - 1, queries, nk,
            low, high, factor, cap, offset, slope, bias_head, bias_q, bias_k, mask_head, mask_q, mask_k, RAW,
        )  # fmt: skip
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        if seed is not None:
            kept = survivors(seed, i, j0, b * heads + h, threshold, BN, PAIRS)
            dp = tl.where(kept, dp * survivor_scale, 0.0)
        acc += p * (dp - delta[:, None])

    rows, cols = tiles_q if SUM_Q else queries, tiles_k if SUM_K else keys
    parts += owner.to(tl.int64) * rows * cols
    dtype: tl.constexpr = parts.dtype.element_ty
    if SUM_Q and SUM_K:
        tl.store(parts + tile_q.to(tl.int64) * cols + tile_k, tl.sum(tl.sum(acc, 1), 0).to(dtype))
    elif SUM_Q:
        tl.store(parts + tile_q.to(tl.int64) * cols + j, tl.sum(acc, 0).to(dtype), mask=j < keys)
    elif SUM_K:
        tl.store(parts + i.to(tl.int64) * cols + tile_k, tl.sum(acc, 1).to(dtype), mask=i < queries)
    else:
        inside = (i < queries)[:, None] & (j < keys)[None, :]
        tl.store(parts + i.to(tl.int64)[:, None] * cols + j[None, :], acc.to(dtype), mask=inside)


def run_backward(
    problem: Problem, dout, dlse, out, lse, dq, dk, dv, dbias_of: Tensor | None
) -> Tensor | None:
    """Writes dq, dk and dv, in memory as [batch, seq, heads, dim] or [tokens, heads, dim]; None: not wanted.

    out: as dq is. lse: contiguous. dbias_of: the bias whose gradient is wanted; returns that.
    """
    q, k, v = problem.tensors[:3]
    exact = problem.dtype == torch.float32 or dbias_of is not None and dbias_of.dtype == torch.float32
    stats = lse.new_empty((3 if exact else 2, lse.numel()))
    flags = problem.flags | {"EXACT": exact, "RAW": problem.flags["RAW"] and not exact}
    given = (*problem.arguments, dout, *problem.dout_strides, stats, lse.numel())
    sums = (lse, 0, 0, 0, 0) if dlse is None else (dlse, *_lse_strides(dlse), 1)
    gradient = (q, 0) if dq is None else (dq, 1)
    (bm, bn), warps, stages = config_for(
        dq_config, q.device, problem.dtype, problem.width, problem.queries, problem.options
    )
    grid = (-(-problem.queries // bm) * problem.heads * problem.batch,)
    cut = {"BM": bm, "BN": bn, "STAGES": stages, "num_warps": warps}
    if grid[0]:
        launch(_dq_kernel, grid, *given, out, lse, *sums, *gradient, **flags, **cut)
    if dk is not None or dv is not None:
        (bm, bn), warps, stages = config_for(
            dkv_config, q.device, problem.dtype, problem.width, problem.keys, problem.options
        )
        grid = (-(-problem.keys // bn) * problem.kv_heads * problem.batch,)
        cut = {"BM": bm, "BN": bn, "STAGES": stages, "num_warps": warps}
        gradients = (
            k if dk is None else dk,
            v if dv is None else dv,
            int(dk is not None),
            int(dv is not None),
        )
        if grid[0]:
            launch(_dkv_kernel, grid, *given, *gradients, **flags, **cut)
    return None if dbias_of is None else _dbias(problem, dbias_of, given, flags)


def _lse_strides(dlse: Tensor) -> tuple[int, int, int]:
    return dlse.stride() if dlse.dim() == 3 else (0, *dlse.stride())


def _dbias(problem: Problem, bias: Tensor, given: tuple, flags: dict) -> Tensor:
    """The gradient of bias, in its dtype: a part of each program, added by torch if there are several."""
    (bm, bn), warps, stages = config_for(
        dbias_config, bias.device, problem.dtype, problem.width, problem.options
    )
    tiles_q, tiles_k = -(-problem.queries // bm), -(-problem.keys // bn)
    kept_b, kept_h, rows, cols = bias.shape
    sum_q, sum_k = rows < problem.queries, cols < problem.keys
    programs = tiles_q * tiles_k * kept_b * kept_h
    if not programs or not problem.batch * problem.heads:
        return torch.zeros_like(bias, memory_format=torch.contiguous_format)
    summed = problem.batch // kept_b * (problem.heads // kept_h)
    splits = max(1, min(summed, _PROGRAMS // programs))
    shape = (splits, kept_b, kept_h, tiles_q if sum_q else rows, tiles_k if sum_k else cols)
    several = splits > 1 or sum_q or sum_k
    parts = bias.new_empty(shape, dtype=torch.float32 if several else bias.dtype)
    launch(
        _dbias_kernel, (programs * splits,),
        *given, parts, kept_b, kept_h, splits,
        **flags, SUM_Q=sum_q, SUM_K=sum_k, BM=bm, BN=bn, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    axes = [0] + [3] * sum_q + [4] * sum_k
    return (parts.sum(axes, keepdim=True)[0] if several else parts[0]).to(bias.dtype)


_PROGRAMS = 264  # two for each multiprocessor of an H100
