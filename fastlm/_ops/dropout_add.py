"""dropout_add: y = dropout(x) + residual, elementwise.

Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15, 2014,
https://jmlr.org/papers/v15/srivastava14a.html.
"""

from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from .._philox import row_scales
from . import _check


def reference(x, residual, dropout_p, seed):
    """y in plain PyTorch; half precision is computed in float32 and rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    if dropout_p > 0:
        y = y * row_scales(seed, x.shape, dropout_p, wide)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype) if y.dtype != x.dtype or y is not x else y.clone()


def check(x, residual, dropout_p, seed):
    """The forward schema's arguments; raises TypeError or ValueError."""
    op = "dropout_add"
    _check.floating(op, "x", x)
    if residual is not None:
        _check.like(op, "residual", residual, x, "x")
    p = _check.probability(op, dropout_p)
    return x, residual, p, _check.dropout_seed(op, p, seed, x)


def _fake_forward(x, residual, dropout_p, seed):
    return x.new_empty(x.shape)


def _fake_backward(dy, dropout_p, seed):
    return dy.new_empty(dy.shape)


OP = Op(
    "dropout_add",
    reference,
    check=check,
    forward=("(Tensor x, Tensor? residual, float dropout_p, Tensor? seed) -> (Tensor y)", _fake_forward),
    backward=("(Tensor dy, float dropout_p, Tensor? seed) -> (Tensor dx)", _fake_backward),
    backends={"cuda": None, "triton": None, "cpu": None},
    shared_gradients={"residual": "dy"},
)


def dropout_add(
    x: Tensor,
    residual: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor:
    """Dropout, with the residual addition after it in the same pass.

    y = x * (0 or 1 / (1 - dropout_p)) + residual. Differentiable in x and residual.

    Args:
        x: float32, float16, bfloat16 or float64, any shape.
        residual: x's shape, dtype and device, or None.
        dropout_p: probability in [0, 1) that an element of x is set to 0; applied whenever it is above 0.
        seed: of the dropout mask: an int, an int64 tensor [1] on x's device, or None to draw one there.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        y, like x.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://jmlr.org/papers/v15/srivastava14a.html; the mask: Philox4x32-10, docs/semantics.md.
    """
    if may_be_usual(backend) and (y := OP.usual(x, residual, dropout_p, seed)) is not None:
        return y
    (y,) = OP(backend, check(x, residual, dropout_p, seed))
    return y
