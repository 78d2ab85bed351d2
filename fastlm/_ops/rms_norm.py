"""rms_norm: y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset) over the last axis.

h = dropout(x) + residual. Source: Zhang, Sennrich, "Root Mean Square Layer Normalization",
https://arxiv.org/abs/1910.07467.
"""

from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from . import _check
from ._norms import NormOutput, contiguous, normed
from ._norms import check as check_norm


def reference(x, weight, eps, weight_offset, residual, dropout_p, seed):
    """(y, h) in plain PyTorch; half precision is computed in float32, h and y are rounded once each."""
    h, n = normed(x, residual, dropout_p, seed)
    y = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(n.dtype) + weight_offset)
    return y.to(x.dtype), h


def check(x, weight, eps, weight_offset, residual, dropout_p, seed):
    """The forward schema's arguments; raises TypeError or ValueError."""
    op = "rms_norm"
    eps, p, seed = check_norm(op, x, {"weight": weight}, eps, residual, dropout_p, seed)
    offset = _check.number(op, "weight_offset", weight_offset)
    if weight is None and offset != 0:
        raise ValueError(f"{op}: weight_offset must be 0 without a weight, got {offset}")
    return x, weight, eps, offset, residual, p, seed


def _fake_forward(x, weight, eps, weight_offset, residual, dropout_p, seed):
    h = contiguous(x, residual is not None or dropout_p > 0)
    return contiguous(x), h, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_backward(dy, dh, x, h, weight, weight_offset, rstd, dropout_p, seed, needs):
    dtype = torch.float32 if weight is None else weight.dtype
    dweight = x.new_empty((x.shape[-1] if needs[1] else 0,), dtype=dtype)
    dx = contiguous(x, needs[0] or (needs[2] and dropout_p == 0))
    return dx, dweight, contiguous(x, needs[2] and dropout_p > 0)


OP = Op(
    "rms_norm",
    reference,
    check=check,
    forward=(
        "(Tensor x, Tensor? weight, float eps, float weight_offset, Tensor? residual, float dropout_p,"
        " Tensor? seed) -> (Tensor y, Tensor h, Tensor rstd)",
        _fake_forward,
    ),
    backward=(
        "(Tensor? dy, Tensor? dh, Tensor x, Tensor h, Tensor? weight, float weight_offset, Tensor rstd,"
        " float dropout_p, Tensor? seed, bool[3] needs)"
        " -> (Tensor dx, Tensor dweight, Tensor dresidual)",
        _fake_backward,
    ),
    backends={"cuda": None, "triton": None, "cpu": None},
    shared_gradients={"residual": "dx"},  # without dropout
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor | NormOutput:
    """Root-mean-square normalisation of the last axis, with dropout and the residual addition in one pass.

    h = dropout(x) + residual, rounded to x's dtype; y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset),
    with sums in float32. Differentiable in x, weight and residual.

    Args:
        x: float32, float16, bfloat16 or float64, shape [..., cols].
        weight: [cols] in x's dtype, or float32 with a half-precision x; None: no scaling.
        eps: added to the mean square, so in units of x squared.
        weight_offset: added to the weight, in float32: 1 for models that learn the weight's distance from 1.
        residual: x's shape, dtype and device.
        dropout_p: probability in [0, 1) that an element of x is set to 0; applied whenever it is above 0.
        seed: of the dropout mask: an int, an int64 tensor [1] on x's device, or None to draw one there.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        y, like x; with a residual NormOutput(y, h).

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://arxiv.org/abs/1910.07467.
    """
    options = (eps, weight_offset, residual, dropout_p, seed)
    if may_be_usual(backend) and (y := OP.usual(x, weight, *options)) is not None:
        return y if residual is None else NormOutput(*y)
    y, h = OP(backend, check(x, weight, *options))
    return y if residual is None else NormOutput(y, h)
