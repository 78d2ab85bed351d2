"""cross_entropy: (1 - e) * (lse - x_t) + e * (lse - mean(x)) + z * lse^2 for each row of logits x.

lse = log(sum(exp(x))), t = target, e = label_smoothing, z = z_loss. Sources: label smoothing, Szegedy et al.,
https://arxiv.org/abs/1512.00567; z loss, Chowdhery et al., "PaLM", section 5, https://arxiv.org/abs/2204.02311.
"""

from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from . import _check

REDUCTIONS = ("none", "sum", "mean")


def reference(logits, target, ignore_index, label_smoothing, z_loss, reduction):
    """The loss in plain PyTorch; half precision is computed in float32 and rounded once.

    A target that is out of range and was not caught gives its row the loss NaN and the gradient 0.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    classes = logits.shape[-1]
    ignored = target == ignore_index
    outside = ~ignored & ((target < 0) | (target >= classes))
    x = logits.to(wide).masked_fill((ignored | outside).unsqueeze(-1), 0.0)
    maximum = x.detach().amax(-1, keepdim=True)
    shifted = x - maximum  # the differences first: they are exact where logits are large and close
    log_sum = shifted.exp().sum(-1).log()
    picked = shifted.gather(-1, target.clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * (log_sum - picked)
    if label_smoothing > 0:
        loss = loss + label_smoothing * (log_sum - shifted.mean(-1))
    if z_loss > 0:
        loss = loss + z_loss * (log_sum + maximum.squeeze(-1)).square()
    loss = loss.masked_fill(ignored, 0.0).masked_fill(outside, float("nan"))
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (~ignored).sum().clamp(min=1)
    return loss.to(logits.dtype)


def check(logits, target, ignore_index, label_smoothing, z_loss, reduction):
    """The forward schema's arguments; raises TypeError, ValueError, or IndexError (a target out of range)."""
    op = "cross_entropy"
    _check.floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{op}: logits must have a last axis of at least one class, got {_check.got(logits)}"
        )
    options = check_options(op, ignore_index, label_smoothing, z_loss, reduction)
    check_target(op, target, logits, logits.shape[-1], ignore_index)
    return logits, target, *options


def check_options(op, ignore_index, label_smoothing, z_loss, reduction):
    """The options as they are passed on; raises TypeError or ValueError."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{op}: ignore_index must be an int, got {_check.got(ignore_index)}")
    label_smoothing = _check.number(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    z_loss = _check.number(op, "z_loss", z_loss)
    if z_loss < 0:
        raise ValueError(f"{op}: z_loss must not be negative, got {z_loss}")
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    return ignore_index, label_smoothing, z_loss, reduction


def check_target(op, target, x, classes, ignore_index):
    """target must hold, for each row of x, one of the classes; raises TypeError, ValueError or IndexError."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be an int64 tensor, got {_check.got(target)}")
    if target.shape != x.shape[:-1] or target.device != x.device:
        shape = tuple(x.shape[:-1])
        raise ValueError(f"{op}: target must have shape {shape} on {x.device}, got {_check.got(target)}")
    if _check.has_values(target):
        _check_range(op, target, ignore_index, classes)


def _check_range(op, target, ignore_index, classes):
    """Raises IndexError for a target that is neither a class nor ignore_index."""
    if target.numel() == 0:
        return
    low, high = torch.aminmax(target)  # one pass; the second is for targets that ignore_index put outside
    if low >= 0 and high < classes:
        return
    outside = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if outside.numel():
        wanted = f"in [0, {classes}) or ignore_index={ignore_index}"
        raise IndexError(f"{op}: target must be {wanted}, got {outside[0].item()}")


def _fake_forward(logits, target, ignore_index, label_smoothing, z_loss, reduction):
    maximum = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    loss = logits.new_empty(logits.shape[:-1] if reduction == "none" else ())
    return loss, maximum, torch.empty_like(maximum), target.new_empty(())


def _fake_backward(
    dloss, logits, target, maximum, exp_sum, count, ignore_index, label_smoothing, z_loss, reduction
):
    return logits.new_empty(logits.shape)


OP = Op(
    "cross_entropy",
    reference,
    check=check,
    forward=(
        "(Tensor logits, Tensor target, int ignore_index, float label_smoothing, float z_loss, str reduction)"
        " -> (Tensor loss, Tensor maximum, Tensor exp_sum, Tensor count)",
        _fake_forward,
    ),
    backward=(
        "(Tensor dloss, Tensor logits, Tensor target, Tensor maximum, Tensor exp_sum, Tensor count,"
        " int ignore_index, float label_smoothing, float z_loss, str reduction) -> (Tensor dlogits)",
        _fake_backward,
    ),
    backends={"cuda": None, "triton": None, "cpu": None},
)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["none", "sum", "mean"] = "mean",
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor:
    """Cross-entropy of class scores, softmax and loss in one pass over the logits.

    Per row, with e = label_smoothing, t = target and lse = log(sum(exp(x))):
    (1 - e) * (lse - x_t) + e * (lse - mean(x)) + z_loss * lse^2, computed in float32. Differentiable in
    logits.

    Args:
        logits: float32, float16, bfloat16 or float64, shape [..., classes].
        target: int64 classes of shape logits.shape[:-1], on logits' device. One that is neither a class nor
            ignore_index raises on the CPU; under torch.compile its row has loss NaN and gradient 0.
        ignore_index: target of rows that count for nothing: loss and gradient 0 whatever their logits are.
        label_smoothing: share in [0, 1] of the target that is spread evenly over all classes.
        z_loss: weight, 0 or more, of lse^2, which keeps the logits from drifting.
        reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", or "none".
        backend: None chooses; a named backend runs it or raises.

    Returns:
        The loss in logits' dtype: a scalar, or of target's shape for "none".

    Raises:
        TypeError, ValueError: an argument is not as above. IndexError: a target is out of range.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://arxiv.org/abs/1512.00567 (label smoothing), https://arxiv.org/abs/2204.02311 (z loss).
    """
    options = (ignore_index, label_smoothing, z_loss, reduction)
    if may_be_usual(backend) and (loss := OP.usual(logits, target, *options)) is not None:
        return loss
    (loss,) = OP(backend, check(logits, target, *options))
    return loss
