"""feed_forward: y = dropout(act(x @ w1.T + b1)) @ w2.T + b2, the position-wise layer of a Transformer.

Source: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762, section 3.3.
"""

from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .._op import Op, may_be_usual
from . import _check, bias_act
from ._autocast import matmul_operands


def reference(x, w1, b1, w2, b2, activation, dropout_p, seed):
    """y in plain PyTorch; half precision is computed in float32 and rounded once, at the end."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = functional.linear(x.to(wide), w1.to(wide), None if b1 is None else b1.to(wide))
    a = bias_act.reference(z, None, activation, dropout_p, seed)
    return functional.linear(a, w2.to(wide), None if b2 is None else b2.to(wide)).to(x.dtype)


def check(x, w1, b1, w2, b2, activation, dropout_p, seed):
    """The forward schema's arguments, cast as autocast casts a matmul's; raises TypeError or ValueError."""
    op = "feed_forward"
    _check.floating(op, "x", x)
    x, w1, b1, w2, b2 = matmul_operands(x, w1, b1, w2, b2)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have a last axis, got {_check.got(x)}")
    _check.weight(op, "w1", w1, ("hidden", x.shape[-1]), x)
    _check.weight(op, "w2", w2, ("out", w1.shape[0]), x)
    for name, bias, size in (("b1", b1, w1.shape[0]), ("b2", b2, w2.shape[0])):
        if bias is not None:
            _check.weight(op, name, bias, (size,), x)
    _check.choice(op, "activation", activation, tuple(bias_act.ACTIVATIONS))
    p = _check.probability(op, dropout_p)
    return x, w1, b1, w2, b2, activation, p, _check.dropout_seed(op, p, seed, x)


def _fake_forward(x, w1, b1, w2, b2, activation, dropout_p, seed):
    y = x.new_empty((*x.shape[:-1], w2.shape[0]))
    return y, x.new_empty((prod(x.shape[:-1]), w1.shape[0]))


def _fake_backward(dy, x, w1, b1, w2, b2, z, activation, dropout_p, seed, needs):
    wanted = zip((x, w1, b1, w2, b2), needs, strict=True)
    return tuple(t.new_empty(t.shape) if need else x.new_empty((0,)) for t, need in wanted)


OP = Op(
    "feed_forward",
    reference,
    check=check,
    forward=(
        "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, float dropout_p,"
        " Tensor? seed) -> (Tensor y, Tensor z)",
        _fake_forward,
    ),
    backward=(
        "(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor z, str activation,"
        " float dropout_p, Tensor? seed, bool[5] needs)"
        " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
        _fake_backward,
    ),
    backends={"cuda": None, "triton": None, "cpu": None},
)


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu",
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor:
    """A Transformer's feed-forward layer: linear, activation, dropout, linear.

    y = dropout(act(x @ w1.T + b1)) @ w2.T + b2. Differentiable in x, weights and biases. Kept for backward
    beside the inputs: x @ w1.T + b1 alone. Under autocast all are cast as torch.nn.functional.linear casts.

    Args:
        x: float32, float16, bfloat16 or float64, shape [..., in].
        w1, w2: [hidden, in] and [out, hidden] as nn.Linear keeps them, in x's dtype.
        b1, b2: [hidden] and [out] in x's dtype; None: 0.
        activation: "gelu" (by erf), "gelu_tanh" (approximated by tanh), "relu" or "silu" (x * sigmoid(x)).
        dropout_p: probability in [0, 1) that an activation is set to 0; applied whenever it is above 0.
        seed: of the dropout mask: an int, an int64 tensor [1] on x's device, or None to draw one there.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        y, shape [..., out], in x's dtype (autocast's where it is on).

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://arxiv.org/abs/1706.03762, section 3.3; the mask: Philox4x32-10, docs/semantics.md.
    """
    options = activation, dropout_p, seed
    if may_be_usual(backend) and (y := OP.usual(x, w1, b1, w2, b2, *options)) is not None:
        return y
    (y,) = OP(backend, check(x, w1, b1, w2, b2, *options))
    return y
