"""attention: out = softmax(scale * q k^T + alibi + bias, over the keys that a query may attend to) v.

Sources: Vaswani et al., "Attention is all you need", https://arxiv.org/abs/1706.03762; in tiles with an
online softmax: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691. i is a query, j a key; query i is
aligned with key i + offset.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from .._philox import attention_scales
from . import _attention_check, _check
from ._autocast import matmul_operands

LARGEST_HEAD = 512  # columns of a head that a CPU tile holds
LARGEST_TRITON_HEAD = 256  # ... and a GPU's registers
CUDA_HEADS = (32, 64, 96, 128, 256)  # columns of a head that csrc/cuda has tiles of
# From here on Triton's kernels save more on the GPU than they cost the host, forward and backward: on an H200
# in bfloat16 8 ps a FLOP, and 0.15 ms.
TRITON_FLOPS = 2e10
_INF = float("inf")


def reference(
    q, k, v, mask, bias, kv_lengths, scale, offset, left, right, softcap, alibi_slopes, dropout_p, seed
):
    """(out, lse) in plain PyTorch; half precision is computed in float32 and rounded once."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (_without_absent_keys(t.to(wide), kv_lengths) for t in (k, v))
    k, v = (_per_query_head(t, q.shape[1]) for t in (k, v))
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)

    s = scale * (q.to(wide) @ k.transpose(-2, -1))
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(wide)[:, :, None, None] * (i + offset - j).abs()
    if bias is not None:
        s = s + bias.to(wide)

    keep = _kept(s, i, j, mask, bias, kv_lengths, offset, left, right)
    empty = ~keep.any(-1, keepdim=True)  # rows with nothing to attend to
    s = s.masked_fill(~keep, -_INF).masked_fill(empty, 0.0)  # a row of only -inf would have NaN gradients
    lse = torch.logsumexp(s, -1).masked_fill(empty[..., 0], -_INF)
    p = torch.softmax(s, -1).masked_fill(empty, 0.0)
    if dropout_p > 0:
        p = p * attention_scales(seed, p.shape, dropout_p, wide)
    out = (p @ v).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse  # heads of one token lie side by side


def _without_absent_keys(t, kv_lengths):
    """`t` [B,Hkv,Sk,D] with 0 past each sequence's length: NaN there reaches neither values nor gradients."""
    if kv_lengths is None:
        return t
    j = torch.arange(t.shape[2], device=t.device)
    return torch.where((j < kv_lengths[:, None])[:, None, :, None], t, 0.0)


def _per_query_head(t, heads):
    """`t` [B,Hkv,Sk,D] as [B,H,Sk,D]: query head h reads kv head h // (H / Hkv)."""
    groups = t.shape[1]
    return t if groups == heads else t.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)


def _kept(s, i, j, mask, bias, kv_lengths, offset, left, right):
    """Boolean, s's shape: whether query i attends to key j."""
    keep = torch.ones_like(s, dtype=torch.bool)
    if mask is not None:
        keep = keep & mask
    if bias is not None:
        keep = keep & (bias != -_INF)
    if kv_lengths is not None:
        keep = keep & (j < kv_lengths[:, None])[:, None, None, :]
    if left >= 0:
        keep = keep & (j >= i + offset - left)
    if right >= 0:
        keep = keep & (j <= i + offset + right)
    return keep


def check(
    q, k, v, causal, mask, bias, kv_lengths, scale, window, softcap, alibi_slopes, dropout_p, seed, return_lse
):
    """The forward schema's arguments; raises TypeError or ValueError."""
    op = "attention"
    q, k, v = matmul_operands(q, k, v)
    _attention_check.heads(op, q, k, v)
    shape = (*q.shape[:3], k.shape[2])
    offset, left, right = _attention_check.diagonal(op, causal, window, q.shape[2], k.shape[2])
    mask = _attention_check.mask(op, mask, q, shape)
    bias = _attention_check.bias(op, bias, q, shape)
    kv_lengths = _attention_check.lengths(op, kv_lengths, q, k.shape[2])
    scale, softcap = _attention_check.score_options(op, scale, q.shape[3], softcap, return_lse)
    slopes = _attention_check.slopes(op, alibi_slopes, q, *q.shape[:2])
    p = _check.probability(op, dropout_p)
    seed = _check.dropout_seed(op, p, seed, q)
    return q, k, v, mask, bias, kv_lengths, scale, offset, left, right, softcap, slopes, p, seed


def _heads_beside(t, shape, wanted=True):
    """A new tensor of `shape` [B,H,S,D], laid out as [B,S,H,D]; empty where it is not wanted."""
    batch, heads, seq, dim = shape
    return t.new_empty((batch, seq, heads, dim)).transpose(1, 2) if wanted else t.new_empty((0,))


def _fake_forward(q, k, v, *_):
    return _heads_beside(q, (*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(dout, dlse, q, k, v, out, lse, mask, bias, *rest):
    needs = rest[-1]
    dq, dk, dv = (_heads_beside(t, t.shape, need) for t, need in zip((q, k, v), needs[:3], strict=True))
    return dq, dk, dv, q.new_empty((0,)) if bias is None else bias.new_empty(bias.shape if needs[3] else (0,))


def _cpu_limits(q, k, v, *_):
    """Head dims above 512."""
    largest = max(q.shape[3], v.shape[3])
    if largest > LARGEST_HEAD:
        return f"attention.cpu takes head dims up to {LARGEST_HEAD}, got {largest}"
    return None


def cuda_heads_missing(op, dim, dim_v):
    """Why the CUDA kernels have no tiles of such heads; None if they do."""
    if dim == dim_v and dim in CUDA_HEADS:
        return None
    known = ", ".join(map(str, CUDA_HEADS))
    got = dim if dim == dim_v else f"{dim} with values of {dim_v}"
    return f"{op}.cuda takes heads as wide in v as in q, of {known}; triton takes others, got {got}"


def _cuda_limits(q, k, v, mask, bias, *_):
    """Head dims other than 32, 64, 96, 128 and 256; in half precision a bias of one number a head."""
    if bias is not None and bias.shape[2] == bias.shape[3] == 1 and q.dtype != torch.float32:
        # out does not hang on it: its gradient is a sum of roundings, and out's are half precision's
        wanted = "a bias that differs between queries or keys in half precision"
        return f"attention.cuda takes {wanted}; triton takes others, got one of {tuple(bias.shape)}"
    return cuda_heads_missing("attention", q.shape[3], v.shape[3])


def _triton_limits(q, k, v, *_):
    """Head dims above 256."""
    largest = max(q.shape[3], v.shape[3])
    if largest > LARGEST_TRITON_HEAD:
        return f"attention.triton takes head dims up to {LARGEST_TRITON_HEAD}, got {largest}"
    return None


def triton_first(q, k, v, *_):
    """Whether so many products of half precision are asked for that Triton's kernels are ahead."""
    batch, heads, queries, dim = q.shape
    flops = 2 * (dim + v.shape[3]) * batch * heads * queries * k.shape[2]
    return q.dtype != torch.float32 and flops >= TRITON_FLOPS


OP = Op(
    "attention",
    reference,
    check=check,
    forward=(
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? kv_lengths, float scale,"
        " SymInt offset, SymInt left, SymInt right, float softcap, Tensor? alibi_slopes, float dropout_p,"
        " Tensor? seed)"
        " -> (Tensor out, Tensor lse)",
        _fake_forward,
    ),
    backward=(
        "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask,"
        " Tensor? bias, Tensor? kv_lengths, float scale, SymInt offset, SymInt left, SymInt right,"
        " float softcap, Tensor? alibi_slopes, float dropout_p, Tensor? seed, bool[4] needs)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
        _fake_backward,
    ),
    backends={"cuda": _cuda_limits, "triton": _triton_limits, "cpu": _cpu_limits},
    triton_first=triton_first,
)


class AttentionOutput(NamedTuple):
    """What attention returns with return_lse: out, and lse, the log of each row's sum of exponentials."""

    out: Tensor
    lse: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | Literal["top_left", "bottom_right"] = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor | AttentionOutput:
    """Scaled dot-product attention whose memory is linear in the sequence length.

    s = scale * q k^T; s = softcap * tanh(s / softcap) if softcap > 0; s += alibi + bias; keys excluded by
    mask, causal, window or kv_lengths count as -inf; out = dropout(softmax(s)) v. A query with nothing to
    attend to gives out 0, lse -inf and gradients 0. Differentiable in q, k, v and bias. With
    off = keys - queries ("top_left": off = 0) query i is aligned with key i + off, whatever kv_lengths says.
    Views whose last dimension is contiguous are read in place.

    Args:
        q: [batch, heads, queries, dim], float32, float16, bfloat16 or float64.
        k: [batch, kv_heads, keys, dim], like q; query head h reads kv head h // (heads / kv_heads).
        v: [batch, kv_heads, keys, dim_v], like q. Under autocast q, k and v are cast as torch.matmul casts.
        causal: True, "bottom_right" or "top_left" keeps keys j <= i + off; True needs queries == keys.
        mask: boolean, True = attend; broadcasts to [batch, heads, queries, keys].
        bias: added to the scores, in q's dtype or float32; broadcasts as mask does; -inf in it means masked.
        kv_lengths: int32 [batch], in [0, keys]: keys from there on are never read.
        scale: of the scores; None is dim ** -0.5.
        window: (left, right) in keys, None = unlimited: keeps i + off - left <= j <= i + off + right.
        softcap: bound of scale * q k^T, 0 = none.
        alibi_slopes: float32 [heads] or [batch, heads]: adds -slope * |i + off - j|; no gradient.
        dropout_p: probability in [0, 1) that a weight is set to 0; applied whenever it is above 0.
        seed: of the dropout mask: an int, an int64 tensor [1] on q's device, or None to draw one there.
        return_lse: also return lse, the log-sum-exp of each row of s, before dropout; differentiable.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        out [batch, heads, queries, dim_v] in q's dtype, laid out so that out.transpose(1, 2) is contiguous;
        with return_lse AttentionOutput(out, lse), lse [batch, heads, queries] float32 (float64 if q is).

    Raises:
        TypeError, ValueError: an argument is not as above. NotImplementedError: `backend` refuses.

    Source: https://arxiv.org/abs/2307.08691; the dropout mask: Philox4x32-10, docs/semantics.md.
    """
    options = (scale, window, softcap, alibi_slopes, dropout_p, seed, return_lse)
    if may_be_usual(backend):
        usual = OP.usual(q, k, v, causal, mask, bias, kv_lengths, *options)
        if usual is not None:
            return AttentionOutput(*usual) if return_lse else usual
    out, lse = OP(backend, check(q, k, v, causal, mask, bias, kv_lengths, *options))
    return AttentionOutput(out, lse) if return_lse else out
