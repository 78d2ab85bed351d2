"""glu: y = act(gate) * up.

Source: Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202.
"""

from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from . import _check
from .bias_act import ACTIVATIONS


def reference(gate, up, activation):
    """y in plain PyTorch; half precision is computed in float32 and rounded once."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype)


def check(gate, up, activation):
    """The forward schema's arguments; raises TypeError or ValueError."""
    op = "glu"
    _check.floating(op, "gate", gate)
    _check.like(op, "up", up, gate, "gate")
    _check.choice(op, "activation", activation, tuple(ACTIVATIONS))
    return gate, up, activation


def _fake_forward(gate, up, activation):
    return gate.new_empty(gate.shape)


def _fake_backward(dy, gate, up, activation, needs):
    return tuple(gate.new_empty(gate.shape if need else (0,)) for need in needs)


OP = Op(
    "glu",
    reference,
    check=check,
    forward=("(Tensor gate, Tensor up, str activation) -> (Tensor y)", _fake_forward),
    backward=(
        "(Tensor dy, Tensor gate, Tensor up, str activation, bool[2] needs) -> (Tensor dgate, Tensor dup)",
        _fake_backward,
    ),
    backends={"cuda": None, "triton": None, "cpu": None},
)


def glu(
    gate: Tensor,
    up: Tensor,
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "silu",
    *,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor:
    """The gate of a gated feed-forward layer in one pass: what stands between its matmuls.

    y = act(gate) * up, computed in float32: SwiGLU with silu, GeGLU with gelu, ReGLU with relu.
    Differentiable in gate and up; backward starts from them again, so that nothing but the inputs is kept.

    Args:
        gate: float32, float16, bfloat16 or float64, any shape.
        up: gate's shape, dtype and device; halves of one packed projection are read in place.
        activation: "silu" (x * sigmoid(x)), "gelu" (by erf), "gelu_tanh" (approximated by tanh) or "relu".
        backend: None chooses; a named backend runs it or raises.

    Returns:
        y, like gate.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://arxiv.org/abs/2002.05202.
    """
    if may_be_usual(backend) and (y := OP.usual(gate, up, activation)) is not None:
        return y
    (y,) = OP(backend, check(gate, up, activation))
    return y
