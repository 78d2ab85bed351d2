"""linear_cross_entropy: the cross-entropy of logits = x @ weight.T + bias, which never exist all at once.

Rows are taken in chunks. A chunk's logits become their own gradient in place, which is multiplied into dx and
dweight at once: three matmuls in all, and no row's logits outlive its chunk. Sources: cross_entropy's; chunks
and the gradient in forward: Hsu et al., "Liger Kernel", https://arxiv.org/abs/2410.10989, section 3.2.
"""

from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .._op import Op, declare
from . import _check, cross_entropy
from ._autocast import is_on, matmul_operands

_ROWS = 512  # of a chunk: with 256 the matmuls are 7% slower, with 1024 2% faster
_ELEMENTS = 1 << 26  # of a chunk's logits at most: 256 MB; a larger vocabulary has fewer rows in a chunk
_CLASSES = 1024  # of a matmul: 22% faster than all at once; and few half-precision weights are float32

IN_PLACE = {
    "cpu": declare(
        "cross_entropy_in_place",
        "cpu",
        (
            "(Tensor(a!) logits, Tensor target, Tensor? dloss, int ignore_index, float label_smoothing,"
            " float z_loss) -> Tensor row_loss",
            lambda logits, target, *_: logits.new_empty(target.shape),
        ),
    )
}


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
    widened = x.itemsize < 4 and is_on(x.device.type)
    return x, weight, bias, target, *options, widened, early


def _blocks(weight):
    """(slice of classes, that part of the weight in float32)."""
    for begin in range(0, weight.shape[0], _CLASSES):
        classes = slice(begin, begin + _CLASSES)
        yield classes, weight[classes].float()


def _chunks(rows, classes):
    """Even slices of the rows, as few as _ROWS and _ELEMENTS allow: cut by shape, whatever the values are."""
    most = max(1, min(_ROWS, _ELEMENTS // classes))
    step = max(1, -(-rows // max(1, -(-rows // most))))
    return [slice(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


class _Gradients:
    """dx [rows, in], dweight [classes, in] and dbias [classes] in float32; empty where not needed."""

    def __init__(self, rows, classes, needs):
        (count, size), new = rows.shape, rows.new_empty if len(rows) else rows.new_zeros
        self.needs = needs
        self.dx = new((count, size) if needs[0] else 0)
        self.dweight = new((classes, size) if needs[1] else 0)
        self.dbias = rows.new_zeros(classes if needs[2] else 0)

    def add(self, chunk, rows, dlogits, weight):
        """Adds what the rows of `chunk`, a slice, give. beta 0 writes instead of adding."""
        if self.needs[0]:
            dx = self.dx[chunk]
            for classes, block in _blocks(weight):
                dx.addmm_(dlogits[:, classes], block, beta=float(classes.start > 0))
        if self.needs[1]:
            self.dweight.addmm_(dlogits.t(), rows, beta=float(chunk.start > 0))
        if self.needs[2]:
            self.dbias += dlogits.sum(0)


def _of_rows(backend, rows, weight, bias, target, dloss, options, needs):
    """(losses [n], dx, dweight, dbias) of float32 rows [n, in]; dloss [n] is for the gradients."""
    losses, found = rows.new_empty(len(rows)), _Gradients(rows, len(weight), needs)
    chunks = _chunks(len(rows), len(weight))
    memory = rows.new_empty(chunks[0].stop if chunks else 0, len(weight))
    for chunk in chunks:
        part = rows[chunk]
        logits = memory[: len(part)]
        for classes, block in _blocks(weight):
            torch.mm(part, block.t(), out=logits[:, classes])
        if bias is not None:
            logits += bias
        given = dloss[chunk] if any(needs) else None
        losses[chunk] = IN_PLACE[backend](logits, target[chunk], given, *options)
        found.add(chunk, part, logits, weight)
    return losses, found.dx, found.dweight, found.dbias


def _run(backend, x, weight, bias, target, dloss, options, needs):
    """(losses of target's shape, dx, dweight, dbias) in float32; ignored rows are left out of the matmuls."""
    rows, targets, dloss = x.reshape(prod(x.shape[:-1]), x.shape[-1]), target.reshape(-1), dloss.reshape(-1)
    used = (targets != options[0]).nonzero().squeeze(1)
    if len(used) < len(targets):
        rows, targets, dloss = rows[used], targets[used], dloss[used]
    losses, dx, *rest = _of_rows(backend, rows.float(), weight, bias, targets, dloss, options, needs)
    if len(used) < target.numel():
        losses = losses.new_zeros(target.numel()).index_copy_(0, used, losses)
        if needs[0]:
            dx = dx.new_zeros(target.numel(), dx.shape[1]).index_copy_(0, used, dx)
    return losses.reshape(target.shape), dx.reshape(x.shape) if needs[0] else dx, *rest


def _loss_dtype(x, widened):
    return torch.float32 if widened else x.dtype


def _divisor(target, ignore_index, reduction):
    return max(1, int((target != ignore_index).sum())) if reduction == "mean" else 1


def _forward(
    backend, x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, widened, early
):
    """(loss, gradients for dloss = 1 as far as `early` says): with them, no logits are computed twice."""
    divisor, options = _divisor(target, ignore_index, reduction), (ignore_index, label_smoothing, z_loss)
    dloss = torch.full(target.shape, 1 / divisor, dtype=torch.float32, device=x.device)
    losses, *gradients = _run(backend, x, weight, bias, target, dloss, options, early)
    loss = losses if reduction == "none" else losses.double().sum() / divisor
    return loss.to(_loss_dtype(x, widened)), *gradients


def _backward(
    backend, dloss, x, weight, bias, target, unit_dx, unit_dweight, unit_dbias,
    ignore_index, label_smoothing, z_loss, reduction, early, needs,
):  # fmt: skip
    """Scales what forward computed, or computes the logits again: with "none" each row has its own dloss."""
    dloss, found = dloss.float(), (unit_dx, unit_dweight, unit_dbias)
    if all(e or not n for e, n in zip(early, needs, strict=True)):
        found = [unit * dloss if need else unit.clone() for unit, need in zip(found, needs, strict=True)]
    else:
        dloss = (dloss / _divisor(target, ignore_index, reduction)).expand(target.shape)
        options = ignore_index, label_smoothing, z_loss
        _, *found = _run(backend, x, weight, bias, target, dloss, options, needs)
    return tuple(f.to(x.dtype) for f in found)


def _fake_forward(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, widened, early):
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=_loss_dtype(x, widened))
    shapes = x.shape, weight.shape, weight.shape[:1]
    return loss, *(
        x.new_empty(shape if e else (0,), dtype=torch.float32) for shape, e in zip(shapes, early, strict=True)
    )


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
    backends={"cpu": None},
    body=(_forward, _backward),
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
    """Cross-entropy of logits = x @ weight.T + bias in the memory of at most 512 rows of logits.

    The loss of fastlm.ops.cross_entropy; differentiable in x, weight and bias. With "mean" and "sum" the
    gradients are computed along with the loss, while a chunk's logits are there, and scaled in backward;
    "none" computes the logits a second time. Rows that are ignored cost nothing. Half precision is computed
    in float32. Under autocast x, weight and bias are cast as torch.nn.functional.linear casts.

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
    (loss,) = OP(backend, check(x, weight, target, bias, *options))
    return loss
