"""softmax: y = exp(s - max(s)) / sum(exp(s - max(s))) over the last axis; s = scale * x, -inf where excluded.

Source: Vaswani et al., "Attention is all you need", section 3.2.1, https://arxiv.org/abs/1706.03762.
"""

from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from . import _check


def reference(x, scale, mask, causal):
    """The softmax in plain PyTorch; half precision is computed in float32 and rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = x.to(wide) * scale
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    if causal:
        later = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        s = s.masked_fill(later, float("-inf"))
    nothing = (s == float("-inf")).all(-1, keepdim=True)
    y = torch.softmax(s.masked_fill(nothing, 0.0), -1)
    return y.masked_fill(nothing, 0.0).to(x.dtype)


def check(x, scale, mask, causal):
    """The forward schema's arguments, mask as a view of x's shape; raises TypeError or ValueError."""
    op = "softmax"
    _check.floating(op, "x", x)
    scale = _check.number(op, "scale", scale)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be True or False, got {_check.got(causal)}")
    if causal and (x.dim() < 2 or x.shape[-1] != x.shape[-2]):
        raise ValueError(f"{op}: x must be square in its last two axes if causal=True, got {_check.got(x)}")
    if mask is not None:
        mask = _check.attention_mask(op, mask, x.shape, x.device)
    return x, scale, mask, causal


def _fake_forward(x, scale, mask, causal):
    return x.new_empty(x.shape)


def _fake_backward(dy, y, scale, causal):
    return y.new_empty(y.shape)


OP = Op(
    "softmax",
    reference,
    check=check,
    forward=("(Tensor x, float scale, Tensor? mask, bool causal) -> (Tensor y)", _fake_forward),
    backward=("(Tensor dy, Tensor y, float scale, bool causal) -> (Tensor dx)", _fake_backward),
    backends={"cuda": None, "triton": None, "cpu": None},
)


def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor:
    """Softmax of the last axis, with the scaling and the masks of attention scores in the same pass.

    y = softmax(scale * x); what is excluded counts as -inf, and a row of nothing else gives 0 and gradient 0
    where torch.softmax gives NaN. Sums in float32. Differentiable in x.

    Args:
        x: float32, float16, bfloat16 or float64, shape [..., cols].
        scale: what x is multiplied with, any finite number.
        mask: boolean, True = attend; broadcasts to x's shape, on x's device. What x holds where it is False
            has no influence, NaN included.
        causal: keep j <= i of the last two axes, which must be equal.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        y, like x: rows sum to 1, or to 0 where there is nothing to attend to.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://arxiv.org/abs/1706.03762.
    """
    if may_be_usual(backend) and (y := OP.usual(x, scale, mask, causal)) is not None:
        return y
    (y,) = OP(backend, check(x, scale, mask, causal))
    return y
