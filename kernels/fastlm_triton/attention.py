"""attention: softmax(scale * q k^T + alibi + bias) v."""

import torch

from ._attention import problem_of, readable, unit_of
from ._attention_backward import run_backward
from ._attention_forward import run_forward


def forward(
    q, k, v, mask, bias, kv_lengths, scale, offset, left, right, softcap, alibi_slopes, dropout_p, seed
):
    """(out, lse) as fastlm/_ops/attention.py declares them."""
    q, k, v = readable(q), readable(k), readable(v)
    problem = problem_of(
        q, k, v, scale, offset, left, right, softcap, alibi_slopes, dropout_p, seed, unit_of(q, k, v),
        mask=mask, bias=bias, lengths=kv_lengths,
    )  # fmt: skip
    batch, heads, seq, _ = q.shape
    out = q.new_empty((batch, seq, heads, v.shape[3]))
    lse = q.new_empty((batch, heads, seq), dtype=torch.float32)
    run_forward(problem, out, lse)
    return out.transpose(1, 2), lse


def backward(
    dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths,
    scale, offset, left, right, softcap, alibi_slopes, dropout_p, seed, needs,
):  # fmt: skip
    """(dq, dk, dv, dbias) as fastlm/_ops/attention.py declares them."""
    q, k, v = readable(q), readable(k), readable(v)
    dout = q.new_zeros(v.shape[3]).expand(out.shape) if dout is None else readable(dout)
    problem = problem_of(
        q, k, v, scale, offset, left, right, softcap, alibi_slopes, dropout_p, seed, unit_of(q, k, v, dout),
        mask=mask, bias=bias, lengths=kv_lengths,
    )  # fmt: skip
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    made = [_beside(t) if need else None for t, need in zip((q, k, v), needs[:3], strict=True)]
    wanted = bias if needs[3] else None
    dbias = run_backward(problem, dout, dlse, out, lse, *made, wanted)
    dq, dk, dv = (q.new_empty((0,)) if t is None else t.transpose(1, 2) for t in made)
    return dq, dk, dv, q.new_empty((0,)) if dbias is None else dbias


def _beside(t):
    """A new tensor for t's [batch, heads, seq, dim], contiguous as [batch, seq, heads, dim]."""
    batch, heads, seq, dim = t.shape
    return t.new_empty((batch, seq, heads, dim))
