"""rms_norm: y = h * rstd(h) * (weight + weight_offset), h = dropout(x) + residual; kernels: _norms.py.

Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", https://arxiv.org/abs/1910.07467.
"""

import torch

from ._norms import run_backward, run_forward
from ._rows import given, output_like, parameter_gradient


def forward(x, weight, eps, weight_offset, residual, dropout_p, seed):
    """(y, h, rstd): h empty without residual and dropout; rstd float32, one for each row."""
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    y, h = run_forward(x, weight, None, eps, weight_offset, residual, dropout_p, seed, None, rstd)
    return y, h, rstd


def backward(dy, dh, x, h, weight, weight_offset, rstd, dropout_p, seed, needs):
    """(dx, dweight, dresidual), those not wanted empty; without dropout dx stands for dresidual."""
    dx = output_like(x, needs[0] or (needs[2] and dropout_p == 0))
    dresidual = output_like(x, needs[2] and dropout_p > 0)
    dweight = parameter_gradient(weight, x, needs[1])
    run_backward(
        dy, dh, h if h.numel() else x, weight, weight_offset, None, rstd, dropout_p, seed, given(dx),
        given(dresidual), given(dweight), None,
    )  # fmt: skip
    return dx, dweight, dresidual
