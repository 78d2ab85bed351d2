"""linear_cross_entropy: the cross-entropy of logits = x @ weight.T + bias, which never exist all at once.

Rows are taken in chunks. A chunk's logits become their gradient, which is multiplied into dx and dweight:
three matmuls in all, and no row's logits outlive its chunk. Sources: cross_entropy's; chunks and the gradient
in forward: Hsu et al., "Liger Kernel", https://arxiv.org/abs/2410.10989, section 3.2.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .._op import Op, autocast_is_on, may_be_usual
from . import _check, cross_entropy
from ._autocast import matmul_operands


def reference(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, widened, early):
    """The loss in plain PyTorch; half precision is computed in float32 and rounded at most once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(wide).masked_fill((target == ignore_index).unsqueeze(-1), 0.0)
    logits = functional.linear(rows, weight.to(wide), None if bias is None else bias.to(wide))
    loss = cross_entropy.reference(logits, target, ignore_index, label_smoothing, z_loss, reduction)
    return loss if widened else loss.to(x.dtype)


def check(x, weight, target, bias, ignore_index, label_smoothing, z_loss, reduction):
    """The forward schema's arguments, cast as autocast casts a matmul's; raises as cross_entropy's.

    widened: the loss stays float32 beside half-precision tensors, as torch's under autocast.
    """
    op = "linear_cross_entropy"
    _check.floating(op, "x", x)
    x, weight, bias = matmul_operands(x, weight, bias)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have a last axis, got {_check.got(x)}")
    _check.weight(op, "weight", weight, ("classes", x.shape[-1]), x)
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have at least one class, got {_check.got(weight)}")
    if bias is not None:
        _check.weight(op, "bias", bias, (weight.shape[0],), x)
    options = cross_entropy.check_options(op, ignore_index, label_smoothing, z_loss, reduction)
    cross_entropy.check_target(op, target, x, weight.shape[0], ignore_index)
    wanted = reduction != "none" and torch.is_grad_enabled()
    early = [wanted and t is not None and t.requires_grad for t in (x, weight, bias)]
    widened = x.itemsize < 4 and autocast_is_on(x.device.type)
    return x, weight, bias, target, *options, widened, early


def _loss_dtype(x, widened):
    return torch.float32 if widened else x.dtype


def kept_dtype(x: Tensor) -> torch.dtype:
    """Of the gradients that forward computes: bfloat16's own; float16's range holds them only when scaled."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _fake_forward(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, widened, early):
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=_loss_dtype(x, widened))
    shapes, kept = (x.shape, weight.shape, weight.shape[:1]), {"dtype": kept_dtype(x)}
    return loss, *(x.new_empty(shape if e else (0,), **kept) for shape, e in zip(shapes, early, strict=True))


def _fake_backward(dloss, x, weight, *rest):
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(shape if n else (0,)) for shape, n in zip(shapes, rest[-1], strict=True))


OP = Op(
    "linear_cross_entropy",
    reference,
    check=check,
    forward=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float label_smoothing,"
        " float z_loss, str reduction, bool widened, bool[3] early)"
        " -> (Tensor loss, Tensor unit_dx, Tensor unit_dweight, Tensor unit_dbias)",
        _fake_forward,
    ),
    backward=(
        "(Tensor dloss, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor unit_dx,"
        " Tensor unit_dweight, Tensor unit_dbias, int ignore_index, float label_smoothing, float z_loss,"
        " str reduction, bool[3] early, bool[3] needs) -> (Tensor dx, Tensor dweight, Tensor dbias)",
        _fake_backward,
    ),
    backends={"cuda": None, "triton": None, "cpu": None},
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["none", "sum", "mean"] = "mean",
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor:
    """Cross-entropy of logits = x @ weight.T + bias, of which only some rows exist at once.

    On a CPU 512 rows at most. On a GPU 2048, 512 MB, and in half precision the gradients of four times as
    many, 1 GB. Beside them the weight's gradient exists in float32, unless x is bfloat16, the weight has 2^23
    elements or more, and rows are no more than those.

    The loss of fastlm.ops.cross_entropy; differentiable in x, weight and bias. With "mean" and "sum" the
    gradients are computed along with the loss, while a chunk's logits are there, and scaled in backward;
    "none" computes the logits a second time. Rows that are ignored cost nothing on a CPU. Half precision is
    computed in float32; bfloat16's gradients are rounded when they are computed, and when they are scaled.
    Under autocast x, weight and bias are cast as torch.nn.functional.linear casts.

    Args:
        x: float32, float16, bfloat16 or float64, shape [..., in].
        weight: [classes, in] as nn.Linear keeps it, in x's dtype.
        target: int64 classes of shape x.shape[:-1], on x's device. One that is neither a class nor
            ignore_index raises on the CPU; under torch.compile its row has loss NaN and gradient 0.
        bias: [classes] in x's dtype; None: 0.
        ignore_index: target of rows that count for nothing: loss and gradient 0 whatever x is.
        label_smoothing: share in [0, 1] of the target that is spread evenly over all classes.
        z_loss: weight, 0 or more, of the square of the logits' log-sum-exp, which keeps them from drifting.
        reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", or "none".
        backend: None chooses; a named backend runs it or raises.

    Returns:
        The loss in x's dtype, float32 under autocast as torch's: a scalar, or of target's shape for "none".

    Raises:
        TypeError, ValueError: an argument is not as above. IndexError: a target is out of range.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://arxiv.org/abs/2410.10989, section 3.2.
    """
    options = ignore_index, label_smoothing, z_loss, reduction
    if may_be_usual(backend) and (loss := OP.usual(x, weight, target, bias, *options)) is not None:
        return loss
    (loss,) = OP(backend, check(x, weight, target, bias, *options))
    return loss
