"""layer_norm: y = (h - mean(h)) * rstd(h) * weight + bias, h = dropout(x) + residual; kernels: _norms.py.

Source: Ba, Kiros, Hinton, "Layer Normalization", https://arxiv.org/abs/1607.06450.
"""

import torch

from ._norms import run_backward, run_forward
from ._rows import output_like


def forward(x, weight, bias, eps, residual, dropout_p, seed):
    """(y, h, statistics): h empty without residual and dropout; statistics float32 [2, rows], mean and rstd."""
    rows = x.numel() // x.shape[-1]
    statistics = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    mean, rstd = statistics.unbind()
    y, h = run_forward(x, weight, bias, eps, 0.0, residual, dropout_p, seed, mean, rstd)
    return y, h, statistics


def backward(dy, dh, x, h, weight, bias, statistics, dropout_p, seed, needs):
    """(dx, dweight, dbias, dresidual); without dropout dresidual is dx, computed once and returned as dx."""
    normed = h if h.numel() else x
    dropout = dropout_p > 0
    dx = output_like(x, needs[0] or (needs[3] and not dropout))
    dresidual = output_like(x, needs[3] and dropout)
    dweight, dbias = (
        torch.empty(
            (x.shape[-1] if need else 0,), dtype=torch.float32 if p is None else p.dtype, device=x.device
        )
        for p, need in ((weight, needs[1]), (bias, needs[2]))
    )
    mean, rstd = statistics.unbind()
    run_backward(dy, dh, normed, weight, 0.0, mean, rstd, dropout_p, seed, dx, dresidual, dweight, dbias)
    return dx, dweight, dbias, dresidual
