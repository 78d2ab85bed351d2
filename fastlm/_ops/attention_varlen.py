"""attention_varlen: attention within each of many sequences that lie packed, one behind the other.

Sequence b has the queries q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]] and the keys and values of cu_seqlens_k
likewise; to them it does what attention does to one of a batch. No padding is computed or kept.

Sources: as attention's; packed sequences: Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135.
"""

from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from . import _attention_check, _check
from . import attention as _dense
from ._autocast import matmul_operands
from .attention import AttentionOutput


def reference(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, top_left, left, right, softcap, slopes, p, seed
):
    """(out, lse): attention's reference on the sequences padded to [B,H,max,D]."""
    rows_q, queries = _rows(cu_seqlens_q, q.shape[0], max_q)
    rows_k, keys = _rows(cu_seqlens_k, k.shape[0], max_k)
    padded = _padded(q, rows_q), _padded(k, rows_k), _padded(v, rows_k)
    offset = 0 if top_left else (keys - queries)[:, None, None, None]
    out, lse = _dense.reference(
        *padded, None, None, keys, scale, offset, left, right, softcap, slopes, p, seed
    )
    out = _packed(out.transpose(1, 2), rows_q, q.shape[0], 0.0)
    return out, _packed(lse.transpose(1, 2), rows_q, q.shape[0], -float("inf")).t().contiguous()


def _rows(cu_seqlens, tokens, longest):
    """(rows, lengths): the row of each sequence's i-th token, int64 [B,longest], and how many it has, [B].

    Past a sequence's end the row is `tokens`, one behind the last; so it is wherever starts are out of order.
    """
    starts = cu_seqlens.long().clamp(0, tokens).cummax(0).values
    lengths = starts.diff().clamp(max=longest)
    i = torch.arange(longest, device=starts.device)
    return torch.where(i < lengths[:, None], starts[:-1, None] + i, tokens), lengths


def _padded(t, rows):
    """`t` [T,H,D] as [B,H,longest,D], 0 past each sequence's end."""
    return torch.cat([t, t.new_zeros((1, *t.shape[1:]))])[rows].transpose(1, 2)


def _packed(t, rows, tokens, fill):
    """`t` [B,longest,...] as [T,...]; `fill` where there is no sequence."""
    made = t.new_full((tokens + 1, *t.shape[2:]), fill)  # the last row takes what is past the ends
    return made.index_put((rows.flatten(),), t.flatten(0, 1))[:-1]


def check(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_q,
    max_k,
    causal,
    scale,
    window,
    softcap,
    alibi_slopes,
    dropout_p,
    seed,
    return_lse,
):
    """The forward schema's arguments; raises TypeError or ValueError."""
    op = "attention_varlen"
    q, k, v = matmul_operands(q, k, v)
    _attention_check.packed_heads(op, q, k, v)
    _attention_check.starts(op, "q", cu_seqlens_q, max_q, q.shape[0], q)
    _attention_check.starts(op, "k", cu_seqlens_k, max_k, k.shape[0], q)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{op}: cu_seqlens_k must have cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)},"
            f" got {tuple(cu_seqlens_k.shape)}"
        )
    same = cu_seqlens_q is cu_seqlens_k and q.shape[0] == k.shape[0]
    top_left, left, right = _attention_check.packed_diagonal(op, causal, window, same)
    scale, softcap = _attention_check.score_options(op, scale, q.shape[2], softcap, return_lse)
    slopes = _attention_check.slopes(op, alibi_slopes, q, cu_seqlens_q.shape[0] - 1, q.shape[1])
    p = _check.probability(op, dropout_p)
    seed = _check.dropout_seed(op, p, seed, q)
    lengths = cu_seqlens_q, cu_seqlens_k, max_q, max_k
    return q, k, v, *lengths, scale, top_left, left, right, softcap, slopes, p, seed


def _fake_forward(q, k, v, *_):
    tokens, heads, _dim = q.shape
    return q.new_empty((tokens, heads, v.shape[2])), q.new_empty((heads, tokens), dtype=torch.float32)


def _fake_backward(dout, dlse, q, k, v, *rest):
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((q, k, v), rest[-1], strict=True))


def _cpu_limits(q, k, v, *_):
    """Head dims above 512."""
    largest = max(q.shape[2], v.shape[2])
    if largest > _dense.LARGEST_HEAD:
        return f"attention_varlen.cpu takes head dims up to {_dense.LARGEST_HEAD}, got {largest}"
    return None


def _cuda_limits(q, k, v, *_):
    """Head dims other than 32, 64, 96, 128 and 256."""
    return _dense.cuda_heads_missing("attention_varlen", q.shape[2], v.shape[2])


def _triton_limits(q, k, v, *_):
    """Head dims above 256."""
    largest = max(q.shape[2], v.shape[2])
    if largest > _dense.LARGEST_TRITON_HEAD:
        return f"attention_varlen.triton takes head dims up to {_dense.LARGEST_TRITON_HEAD}, got {largest}"
    return None


def _triton_first(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *_):
    """As attention's, of every token with the longest sequence's keys: the host knows no other lengths."""
    tokens, heads, dim = q.shape
    flops = 2 * (dim + v.shape[2]) * heads * tokens * max_k
    return q.dtype != torch.float32 and flops >= _dense.TRITON_FLOPS


_OPTIONS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k, float scale, bool top_left,"
    " SymInt left, SymInt right, float softcap, Tensor? alibi_slopes, float dropout_p, Tensor? seed"
)
OP = Op(
    "attention_varlen",
    reference,
    check=check,
    forward=(f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)", _fake_forward),
    backward=(
        f"(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS},"
        " bool[3] needs) -> (Tensor dq, Tensor dk, Tensor dv)",
        _fake_backward,
    ),
    backends={"cuda": _cuda_limits, "triton": _triton_limits, "cpu": _cpu_limits},
    triton_first=_triton_first,
)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool | Literal["top_left", "bottom_right"] = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor | AttentionOutput:
    """Attention within each of many sequences packed one behind the other, without padding.

    Sequence b attends from q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]] to k and v of cu_seqlens_k likewise, as
    attention does with one of a batch: see there for the formula and for every option. Alignment is of each
    sequence: with off = its keys - its queries ("top_left": off = 0) its query i is aligned with its key
    i + off. A sequence may be empty, on either side; queries without keys give out 0, lse -inf, gradients 0.
    Views whose last dimension is contiguous, such as slices of a packed projection, are read in place.

    Args:
        q: [tokens, heads, dim], float32, float16, bfloat16 or float64.
        k: [tokens_k, kv_heads, dim], like q; query head h reads kv head h // (heads / kv_heads).
        v: [tokens_k, kv_heads, dim_v], like q. Under autocast q, k and v are cast as torch.matmul casts.
        cu_seqlens_q: int32 [sequences + 1] on q's device: where sequences start, and the end of the last:
            from 0 to tokens, never decreasing. Where the values cannot be looked at (on a GPU, under
            torch.compile) they are cut to that; then tokens of no sequence give out 0, lse -inf, gradients 0.
        cu_seqlens_k: the same of k and v; causal=True needs the very tensor that cu_seqlens_q is.
        max_q: how many queries the longest sequence has, or more.
        max_k: how many keys the longest sequence has, or more.
        causal: True, "bottom_right" or "top_left" keeps keys j <= i + off.
        scale: of the scores; None is dim ** -0.5.
        window: (left, right) in keys, None = unlimited: keeps i + off - left <= j <= i + off + right.
        softcap: bound of scale * q k^T, 0 = none.
        alibi_slopes: float32 [heads] or [sequences, heads]: adds -slope * |i + off - j|; no gradient.
        dropout_p: probability in [0, 1) that a weight is set to 0; the mask is that of the padded batch.
        seed: of the dropout mask: an int, an int64 tensor [1] on q's device, or None to draw one there.
        return_lse: also return lse, the log-sum-exp of each row of scores, before dropout; differentiable.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        out [tokens, heads, dim_v] in q's dtype; with return_lse AttentionOutput(out, lse), lse
        [heads, tokens] float32 (float64 if q is).

    Raises:
        TypeError, ValueError: an argument is not as above. NotImplementedError: `backend` refuses.

    Source: https://arxiv.org/abs/2307.08691; the dropout mask: Philox4x32-10, docs/semantics.md.
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    options = (scale, window, softcap, alibi_slopes, dropout_p, seed, return_lse)
    if may_be_usual(backend):
        usual = OP.usual(q, k, v, *lengths, causal, *options)
        if usual is not None:
            return AttentionOutput(*usual) if return_lse else usual
    out, lse = OP(backend, check(q, k, v, *lengths, causal, *options))
    return AttentionOutput(out, lse) if return_lse else out
