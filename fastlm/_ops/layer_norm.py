"""layer_norm: y = (h - mean(h)) / sqrt(mean((h - mean(h))^2) + eps) * weight + bias over the last axis.

h = dropout(x) + residual. Source: Ba, Kiros, Hinton, "Layer Normalization", https://arxiv.org/abs/1607.06450.
"""

from math import prod
from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from ._norms import NormOutput, contiguous, normed
from ._norms import check as check_norm


def reference(x, weight, bias, eps, residual, dropout_p, seed):
    """(y, h) in plain PyTorch; half precision is computed in float32, h and y are rounded once each."""
    h, n = normed(x, residual, dropout_p, seed)
    n = n - n.mean(-1, keepdim=True)
    y = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(n.dtype)
    if bias is not None:
        y = y + bias.to(n.dtype)
    return y.to(x.dtype), h


def check(x, weight, bias, eps, residual, dropout_p, seed):
    """The forward schema's arguments; raises TypeError or ValueError."""
    parameters = {"weight": weight, "bias": bias}
    eps, p, seed = check_norm("layer_norm", x, parameters, eps, residual, dropout_p, seed)
    return x, weight, bias, eps, residual, p, seed


def _fake_forward(x, weight, bias, eps, residual, dropout_p, seed):
    statistics = x.new_empty((2, prod(x.shape[:-1])), dtype=torch.float32)
    return contiguous(x), contiguous(x, residual is not None or dropout_p > 0), statistics


def _fake_backward(dy, dh, x, h, weight, bias, statistics, dropout_p, seed, needs):
    dweight, dbias = (
        x.new_empty((x.shape[-1] if need else 0,), dtype=torch.float32 if p is None else p.dtype)
        for p, need in ((weight, needs[1]), (bias, needs[2]))
    )
    dx = contiguous(x, needs[0] or (needs[3] and dropout_p == 0))
    return dx, dweight, dbias, contiguous(x, needs[3] and dropout_p > 0)


OP = Op(
    "layer_norm",
    reference,
    check=check,
    forward=(
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual, float dropout_p, Tensor? seed)"
        " -> (Tensor y, Tensor h, Tensor statistics)",
        _fake_forward,
    ),
    backward=(
        "(Tensor? dy, Tensor? dh, Tensor x, Tensor h, Tensor? weight, Tensor? bias, Tensor statistics,"
        " float dropout_p, Tensor? seed, bool[4] needs)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
        _fake_backward,
    ),
    backends={"cuda": None, "triton": None, "cpu": None},
    shared_gradients={"residual": "dx"},  # without dropout
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor | NormOutput:
    """Layer normalisation of the last axis, with the dropout and the residual addition before it in one pass.

    h = dropout(x) + residual, rounded to x's dtype; y = (h - mean) / sqrt(variance + eps) * weight + bias,
    with sums in float32. Differentiable in x, weight, bias and residual.

    Args:
        x: float32, float16, bfloat16 or float64, shape [..., cols].
        weight, bias: [cols] in x's dtype, or float32 with a half-precision x; None: 1 and 0.
        eps: added to the variance, so in units of x squared.
        residual: x's shape, dtype and device.
        dropout_p: probability in [0, 1) that an element of x is set to 0; applied whenever it is above 0.
        seed: of the dropout mask: an int, an int64 tensor [1] on x's device, or None to draw one there.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        y, like x; with a residual NormOutput(y, h).

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://arxiv.org/abs/1607.06450.
    """
    options = (eps, residual, dropout_p, seed)
    if may_be_usual(backend) and (y := OP.usual(x, weight, bias, *options)) is not None:
        return y if residual is None else NormOutput(*y)
    y, h = OP(backend, check(x, weight, bias, *options))
    return y if residual is None else NormOutput(y, h)
