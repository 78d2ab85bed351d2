"""bias_act: y = dropout(act(x + bias)) over the last axis.

Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415: gelu, its tanh
form, and silu.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .._op import Op, may_be_usual
from .._philox import row_scales
from . import _check

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


def reference(x, bias, activation, dropout_p, seed):
    """y in plain PyTorch; half precision is computed in float32 and rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = x.to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    y = ACTIVATIONS[activation](z)
    if dropout_p > 0:
        y = y * row_scales(seed, x.shape, dropout_p, wide)
    return y.to(x.dtype)


def check(x, bias, activation, dropout_p, seed):
    """The forward schema's arguments; raises TypeError or ValueError."""
    op = "bias_act"
    _check.floating(op, "x", x)
    if bias is not None:
        if x.dim() == 0:
            raise ValueError(f"{op}: x must have a last axis for bias, got {_check.got(x)}")
        _check.parameter(op, "bias", bias, x.shape[-1], x)
    _check.choice(op, "activation", activation, tuple(ACTIVATIONS))
    p = _check.probability(op, dropout_p)
    return x, bias, activation, p, _check.dropout_seed(op, p, seed, x)


def _fake_forward(x, bias, activation, dropout_p, seed):
    return x.new_empty(x.shape)


def _fake_backward(dy, x, bias, activation, dropout_p, seed, needs):
    cols = x.shape[-1] if x.dim() else 1
    dtype = torch.float32 if bias is None else bias.dtype
    dx = x.new_empty(x.shape if needs[0] else (0,))
    return dx, x.new_empty((cols if needs[1] else 0,), dtype=dtype)


OP = Op(
    "bias_act",
    reference,
    check=check,
    forward=(
        "(Tensor x, Tensor? bias, str activation, float dropout_p, Tensor? seed) -> (Tensor y)",
        _fake_forward,
    ),
    backward=(
        "(Tensor dy, Tensor x, Tensor? bias, str activation, float dropout_p, Tensor? seed, bool[2] needs)"
        " -> (Tensor dx, Tensor dbias)",
        _fake_backward,
    ),
    backends={"cuda": None, "triton": None, "cpu": None},
)


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu",
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor:
    """Bias, activation and dropout in one pass: what stands between the two matmuls of a feed-forward layer.

    y = act(x + bias) * (0 or 1 / (1 - dropout_p)), computed in float32. Differentiable in x and bias;
    backward starts from x again, so that nothing but the inputs is kept.

    Args:
        x: float32, float16, bfloat16 or float64, any shape.
        bias: [cols] in x's dtype, or float32 with a half-precision x; None: 0.
        activation: "gelu" (by erf), "gelu_tanh" (approximated by tanh), "relu" or "silu" (x * sigmoid(x)).
        dropout_p: probability in [0, 1) that an element of y is set to 0; applied whenever it is above 0.
        seed: of the dropout mask: an int, an int64 tensor [1] on x's device, or None to draw one there.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        y, like x.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://arxiv.org/abs/1606.08415; the mask: Philox4x32-10, docs/semantics.md.
    """
    if may_be_usual(backend) and (y := OP.usual(x, bias, activation, dropout_p, seed)) is not None:
        return y
    (y,) = OP(backend, check(x, bias, activation, dropout_p, seed))
    return y
