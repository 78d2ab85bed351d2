"""The forward kernel of attention, dense and packed.

out = softmax(s) v, lse = log sum exp(s), s as csrc/contract/attention.h has it.

A program computes BM queries of one head: q, its sums and the running maximum stay in registers, tiles of BN
keys and values come through shared memory, STAGES - 1 ahead. Tiles that no query sees are not loaded. q, out
and lse move once; k and v once per BM queries and head, mostly from L2, as programs of one head run side by
side. Bound: 4 * dim FLOPs per pair of query and key that see each other.
Source: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691.
"""

import torch
import triton
import triton.language as tl

from ._attention import (
    LIGHT,
    SCALARS,
    Problem,
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
    zero_gaps,
)
from ._config import Config, config_for
from ._launch import launch


def forward_config(arch: int, dtype: torch.dtype, width: int, queries: int, options: str) -> Config:
    """Queries and keys of a tile; registers as ptxas counts them, none spilled. options: Problem.options."""
    if dtype == torch.float32:  # exact products unroll into multiply-adds: 12 s to compile 32 x 32 x 256
        if width <= 64 and options == "packed":
            return Config((32, 16), 4, 2)  # 96 registers, where 32 keys spill a few
        return Config((32, 32) if width <= 128 else (16, 16), 8, 2)  # with 4 warps 32 x 32 spill
    if queries <= 64:  # short: half a tile of 128 would be idle
        narrow = width <= 128 and (arch != 100 or options in LIGHT)  # else 4 warps spill
        return Config((64, 32), 4 if narrow else 8, 2)
    if width <= 64:
        if options not in LIGHT:  # of 128 queries 20 to 170 spills: 241 registers, 168 on sm_90
            return Config((64, 64), 4, 2)
        if arch == 90:  # measured, see dq_config: 211 us, of 128 queries 223
            return Config((64, 64), 4, 3)
        if options and arch == 100:
            return Config((128, 64), 8, 2)  # with 4 warps 16 spills
        return Config((128, 64), 4, 2 if has_100_kb(arch) else 3)  # 236 registers: two programs at a time
    if arch == 90:  # wgmma reads q and k from shared memory, so registers are left: 234, 255
        if width > 128:
            return Config((128, 64), 8, 2)
        return Config((128, 128), 8, 3 if options in LIGHT else 2)  # measured: 1188 us, 1229
    if width <= 128:
        return Config((128, 64), 8, 2)  # 214 registers
    return Config((64, 32 if has_100_kb(arch) else 64), 8, 2)  # 177 registers, 104 KB; 156 registers, 68 KB


@triton.jit(do_not_specialize=SCALARS)
def _forward_kernel(
    q, k, v, mask, bias, lengths, starts_q, starts_k, slopes, seed,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b, slopes_h,
    heads, group, batch, queries, keys, tokens_q, tokens_k, dim, dim_v, offset, left, right,
    factor, cap, scale, threshold, survivor_scale,
    out, lse,
    RAW: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
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
    width_v = dim_v * UNIT
    out_s = heads.to(tl.int64) * width_v
    out += h.to(tl.int64) * width_v
    lse += (h.to(tl.int64) * tokens_q + first_q) if PACKED else (b.to(tl.int64) * heads + h) * queries
    if PACKED:
        if tile == 0:
            begin, end = owned_rows(starts_q, b, batch, first_q, tokens_q)
            zero_gaps(out, out_s, first_q, nq, begin, end, e, width_v, BM, EVEN)
            for at in range(0, (end - begin - nq).to(tl.int32), BM):
                rows = begin + at + r
                rows = tl.where(rows < first_q, rows, rows + nq)
                tl.store(lse + (rows - first_q), float("-inf"), mask=rows < end)
    if tile * BM >= nq:
        return
    out += first_q * out_s

    i = tile * BM + r
    q, q_s = head_of(q, b, h, first_q, q_b, q_h, q_s, UNIT, PACKED)
    k, k_s = head_of(k, b, h // group, first_k, k_b, k_h, k_s, UNIT, PACKED)
    v, v_s = head_of(v, b, h // group, first_k, v_b, v_h, v_s, UNIT, PACKED)
    slope = None
    if slopes is not None:
        slope = in_log2(tl.load(slopes + b.to(tl.int64) * slopes_b + h.to(tl.int64) * slopes_h))
    if mask is not None:
        mask += b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h
    if bias is not None:
        bias += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    q_tile = load_rows(q, q_s, i, d, nq, dim * UNIT, EVEN)

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    begin = tl.maximum(0, tile * BM + low) // BN * BN
    end = tl.minimum(nk, tl.minimum(tile * BM + BM, nq) + high)
    for j0 in tl.range(begin, end, BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        k_tile = load_rows(k, k_s, j, d, nk, dim * UNIT, EVEN)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s, _ = scores_of(
            qk, i[:, None], j[None, :], nq, nk, factor, cap, low + left, slope, bias, bias_q, bias_k, RAW
        )
        s = hide(
            s, float("-inf"), i[:, None], j[None, :], tile * BM, tile * BM + BM - 1, j0, j0 + BN - 1, nq, nk,
            low, high, mask, mask_q, mask_k,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen no key yet
        if RAW:
            p = tl.exp2(s * factor - (base * factor)[:, None])
            shrink = tl.exp2((top - base) * factor)
        else:
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        if seed is not None:
            p = tl.where(survivors(seed, i, j0, b * heads + h, threshold, BN, PAIRS), p, 0.0)
        v_tile = load_rows(v, v_s, j, e, nk, dim_v * UNIT, EVEN)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)

    # the usual division is up to two bits off, too much where float32 is the result
    share = tl.div_rn(survivor_scale, total) if q_tile.dtype == tl.float32 else survivor_scale / total
    weight = tl.where(total == 0, 0.0, share)  # nothing to attend to: 0
    store_rows(out, out_s, i, e, nq, width_v, acc * weight[:, None], EVEN)
    if RAW:
        top *= factor
    sums = tl.where(total == 0, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + i, sums, mask=i < nq)


def run_forward(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Writes out, in memory as [batch, seq, heads, dim] or [tokens, heads, dim], and lse, contiguous."""
    (bm, bn), warps, stages = config_for(
        forward_config, out.device, problem.dtype, problem.width, problem.queries, problem.options
    )
    grid = (-(-problem.queries // bm) * problem.heads * problem.batch,)
    if grid[0]:
        launch(
            _forward_kernel,
            grid,
            *problem.arguments,
            out,
            lse,
            **problem.flags,
            BM=bm,
            BN=bn,
            STAGES=stages,
            num_warps=warps,
        )
