"""attention: softmax(scale * q k^T + alibi + bias) v."""

import torch

from ._attention import problem_of, readable
from ._attention_backward import run_backward
from ._attention_forward import run_forward


def forward(
    q, k, v, mask, bias, kv_lengths, scale, offset, left, right, softcap, alibi_slopes, dropout_p, seed
):
    """(out, lse) as fastlm/_ops/attention.py declares them."""
    q, k, v = readable(q), readable(k), readable(v)
    problem = problem_of(
        q, k, v, None, scale, offset, left, right, softcap, alibi_slopes, dropout_p, seed, mask, bias,
        kv_lengths,
    )  # fmt: skip
    out = _beside(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    run_forward(problem, out, lse)
    return out, lse


def backward(
    dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths,
    scale, offset, left, right, softcap, alibi_slopes, dropout_p, seed, needs,
):  # fmt: skip
    """(dq, dk, dv, dbias) as fastlm/_ops/attention.py declares them."""
    q, k, v = readable(q), readable(k), readable(v)
    dout = q.new_zeros(v.shape[3]).expand(out.shape) if dout is None else readable(dout)
    problem = problem_of(
        q, k, v, dout, scale, offset, left, right, softcap, alibi_slopes, dropout_p, seed, mask, bias,
        kv_lengths,
    )  # fmt: skip
    if not out.transpose(1, 2).is_contiguous():
        out = _beside(out, out.shape[3]).copy_(out)
    made = [_beside(t, t.shape[3]) if need else None for t, need in zip((q, k, v), needs[:3], strict=True)]
    wanted = bias if needs[3] else None
    dbias = run_backward(problem, dout, dlse, out, lse.contiguous(), *made, wanted)
    dq, dk, dv = (q.new_empty((0,)) if t is None else t for t in made)
    return dq, dk, dv, q.new_empty((0,)) if dbias is None else dbias


def _beside(t: torch.Tensor, dim: int) -> torch.Tensor:
    """A new [batch, heads, seq, dim] of t's, its memory as that of a contiguous [batch, seq, heads, dim]."""
    batch, heads, seq, _ = t.shape
    strides = (seq * heads * dim, dim, heads * dim, 1)
    return torch.empty_strided((batch, heads, seq, dim), strides, dtype=t.dtype, device=t.device)
