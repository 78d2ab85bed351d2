"""layer_norm: y = (h - mean(h)) * rstd(h) * weight + bias, h = dropout(x) + residual; kernels: _norms.py.

Source: Ba, Kiros, Hinton, "Layer Normalization", https://arxiv.org/abs/1607.06450.
"""

import torch

from ._norms import run_backward, run_forward
from ._rows import given, output_like, parameter_gradient


def forward(x, weight, bias, eps, residual, dropout_p, seed):
    """(y, h, statistics): h empty without residual and dropout; statistics float32 [2, rows]: mean, rstd."""
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty((2, rows), dtype=torch.float32)
    mean, rstd = statistics.unbind()
    y, h = run_forward(x, weight, bias, eps, 0.0, residual, dropout_p, seed, mean, rstd)
    return y, h, statistics


def backward(dy, dh, x, h, weight, bias, statistics, dropout_p, seed, needs):
    """(dx, dweight, dbias, dresidual), those not wanted empty; without dropout dx stands for dresidual."""
    dx = output_like(x, needs[0] or (needs[3] and dropout_p == 0))
    dresidual = output_like(x, needs[3] and dropout_p > 0)
    dweight = parameter_gradient(weight, x, needs[1])
    dbias = parameter_gradient(bias, x, needs[2])
    mean, rstd = statistics.unbind()
    run_backward(
        dy, dh, h if h.numel() else x, weight, 0.0, mean, rstd, dropout_p, seed, given(dx), given(dresidual),
        given(dweight), given(dbias),
    )  # fmt: skip
    return dx, dweight, dbias, dresidual
