"""attention: softmax(scale * q k^T + alibi + bias) v."""

import torch

from ._attention import problem_of, readable, unit_of
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
