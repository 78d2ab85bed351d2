"""attention_varlen: attention within each of many sequences packed one behind the other.

The kernels are attention's: _attention_forward.py, _attention_backward.py. A program whose tile lies past its
sequence's end returns at once; max_q and max_k only say how many tiles there are. Tokens of no sequence are
written by the first tile's program of the sequence beside them.
"""

import torch
from torch import Tensor

from ._attention import Problem, problem_of, readable
from ._attention_backward import run_backward
from ._attention_forward import run_forward


def _problem(read, starts_q, starts_k, max_q, max_k, scale, top_left, *options) -> Problem:
    """read: q, k, v and dout, which may be None."""
    return problem_of(
        *read, scale, 0 if top_left else 1, *options,
        starts_q=starts_q.contiguous(), starts_k=starts_k.contiguous(), longest=(max_q, max_k),
    )  # fmt: skip


def forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k,
    scale, top_left, left, right, softcap, alibi_slopes, dropout_p, seed,
):  # fmt: skip
    """(out, lse) as fastlm/_ops/attention_varlen.py declares them."""
    read = [readable(q), readable(k), readable(v), None]
    problem = _problem(
        read, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, top_left, left, right, softcap, alibi_slopes,
        dropout_p, seed,
    )  # fmt: skip
    tokens, heads, _ = q.shape
    computed = problem.batch and max_q  # else all tokens are of no sequence, and no program sees to them
    out = (q.new_empty if computed else q.new_zeros)((tokens, heads, v.shape[2]))
    lse = q.new_empty((heads, tokens), dtype=torch.float32)
    if computed:
        run_forward(problem, out, lse)
    else:
        lse.fill_(-float("inf"))
    return out, lse


def backward(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k,
    scale, top_left, left, right, softcap, alibi_slopes, dropout_p, seed, needs,
):  # fmt: skip
    """(dq, dk, dv) as fastlm/_ops/attention_varlen.py declares them."""
    dout = q.new_zeros(v.shape[2]).expand(out.shape) if dout is None else dout
    read = [readable(t) for t in (q, k, v, dout)]
    problem = _problem(
        read, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, top_left, left, right, softcap, alibi_slopes,
        dropout_p, seed,
    )  # fmt: skip
    computed = (problem.batch and max_q, problem.batch and max_k, problem.batch and max_k)
    dq, dk, dv = (_gradient_of(t, need, by) for t, need, by in zip((q, k, v), needs, computed, strict=True))
    run_backward(problem, read[3], dlse, out.contiguous(), lse.contiguous(), dq, dk, dv, None)
    return tuple(q.new_empty((0,)) if t is None else t for t in (dq, dk, dv))


def _gradient_of(t: Tensor, wanted: bool, computed: int) -> Tensor | None:
    """A new tensor like t, contiguous; of zeros where no program writes it."""
    if not wanted:
        return None
    return (t.new_empty if computed else t.new_zeros)(t.shape)
