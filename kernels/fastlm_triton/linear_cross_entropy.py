"""linear_cross_entropy: the cross-entropy of logits = x @ weight.T + bias, which never exist all at once.

Rows are taken in chunks: torch's matmul writes a chunk's logits, float32 of operands in their own dtype; the
kernel of cross_entropy.py turns them into losses and gradients; two more of torch's matmuls add these to dx
and dweight, in half precision those of several chunks together. Gradients meet the matmuls rounded to x's
dtype. Ignored rows are zeros there: only the GPU knows which they are. Bound by the FLOPs of three matmuls, 6
rows in classes; beside them a logit's 4 bytes are written once and read twice, and its gradient is written
once and read twice. Source: cross_entropy's; chunks and the gradient in forward: Hsu et al., "Liger Kernel",
https://arxiv.org/abs/2410.10989, section 3.2.
"""

from contextlib import nullcontext

import torch

from ._config import cdiv
from .cross_entropy import add_up, write_row_losses

ROWS = 2048  # of a chunk at most
ELEMENTS = 1 << 27  # of its logits at most, 512 MB: more classes, fewer rows in a chunk
# Chunks whose gradients wait for one another, in half precision: each addition to dweight moves 8 bytes a
# weight, on an H200 as long as the products of 700 rows. In chunks of 512 rows 7 matmuls that add to dweight
# took 11.2 ms there, the first, which only writes, 1.1.
GROUP = 4
# Weights from which on dweight may be the matmul's own result in half precision: of fewer cuBLAS may split a
# sum, and add its parts in half precision.
UNSPLIT = 1 << 23
EVEN = 16  # where a size or a stride is odd, cuBLAS takes kernels for any alignment


def class_parts(classes: int) -> list[slice]:
    """As many classes as are a multiple of EVEN, then the rest: what products are taken of.

    Of 50257 classes the kernels for any alignment took 31 ms on an H200, where others need about 6.
    """
    even = classes // EVEN * EVEN
    return [part for part in (slice(0, even), slice(even, classes)) if part.start < part.stop]


def chunk_rows(rows: int, classes: int) -> int:
    """Rows of each chunk but the last, for even chunks as few as the bounds allow."""
    most = min(max(ELEMENTS // classes, 1), ROWS)
    return max(cdiv(rows, max(cdiv(rows, most), 1)), 1)


def kept_dtype(x: torch.Tensor) -> torch.dtype:
    """Of the gradients that forward computes: bfloat16's own; float16's range holds them only when scaled."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _outside_autocast(device: torch.device):
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, keep: bool) -> None:
    """out = a @ b, plus out if `keep`; a, b of one dtype; out float32, or of theirs if nothing is kept."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=int(keep), out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, torch.float32, beta=int(keep), out=out)
    elif a.is_cuda:
        torch.mm(a, b, out=out)
    else:  # the same sums: products of halves are exact in float32
        out.copy_(torch.addmm(out.float(), a.float(), b.float(), beta=int(keep)))


def _gradients_of(rows, weight, dlogits, ignored, first: bool, dx, dweight, dbias) -> None:
    """Writes a group's dx, adds to dbias and to dweight (writes it if it is the first); None: not wanted."""
    for part in class_parts(len(weight)):
        share = dlogits[:, part]
        if dx is not None:
            _add_product(dx, share, weight[part], part.start > 0)
        if dweight is None:
            continue
        if share.shape[1] < EVEN and dweight.dtype != torch.float32:  # what is over: few sums, may be split
            sums = torch.empty_like(dweight[part], dtype=torch.float32)
            _add_product(sums, share.t(), rows, False)
            dweight[part] = sums
        else:
            _add_product(dweight[part], share.t(), rows, not first)
    if dx is not None:
        dx.masked_fill_(ignored, 0)  # 0 times an infinite weight is NaN
    if dbias is not None:
        dbias.add_(dlogits.sum(0, dtype=torch.float32))


def _room(x, weight, n, at_once: bool, needs) -> list:
    """For dx, dweight, dbias, zeros where something is added; None: not wanted. at_once: all n rows are."""
    (classes, size), usual = weight.shape, torch.float32
    of_weight = kept_dtype(x) if at_once and classes * size >= UNSPLIT else usual
    asked = ((n, size), usual), ((classes, size), of_weight), ((classes,), usual)
    made = [
        torch.empty(shape, dtype=dtype, device=x.device) if need else None
        for (shape, dtype), need in zip(asked, needs, strict=True)
    ]
    for gradient in made[2 if n else 1 :]:
        if gradient is not None:
            gradient.zero_()
    return made


def _run(x, weight, bias, target, options, dloss, needs):
    """(losses, float32; dx, dweight, dbias, float32 or of kept_dtype, those not wanted empty).

    target: [rows], contiguous. options: (ignore_index, label_smoothing, z_loss). dloss: float32, of each row
    or one for all; None: 1.
    """
    (classes, size), n, any_needs = weight.shape, target.numel(), any(needs)
    floats, in_place = {"dtype": torch.float32, "device": x.device}, x.dtype == torch.float32
    step = chunk_rows(n, classes)
    group = min(max(n, 1), GROUP * step) if any_needs and not in_place else step
    losses, made = torch.empty(n, **floats), _room(x, weight, n, n <= group, needs)
    late = None  # float16 holds the gradients of a row's loss, not of that over a million or scaled up
    if dloss is not None and dloss.dim() == 0 and x.dtype == torch.float16:
        late, dloss = dloss, None
    pitch = EVEN * cdiv(classes, EVEN)
    logits = torch.empty((step, pitch), **floats)
    dlogits = logits if in_place else x.new_empty((group if any_needs else 0, pitch))
    logits, dlogits = logits[:, :classes], dlogits[:, :classes]
    for start in range(0, n, group):
        end = min(start + group, n)
        ignored = (target[start:end] == options[0]).unsqueeze(-1)
        rows = x.reshape(n, size)[start:end].masked_fill(ignored, 0)
        for begin in range(start, end, step):
            part = slice(begin, min(begin + step, end))
            chunk, here = rows[begin - start : part.stop - start], logits[: part.stop - begin]
            for classes_of in class_parts(classes):
                _add_product(here[:, classes_of], chunk, weight[classes_of].t(), False)
            gradient = dlogits[begin - start : part.stop - start] if any_needs else None
            each = dloss[part] if dloss is not None and dloss.dim() else dloss
            to = {"bias": bias, "dlogits": gradient, "dloss": each}
            write_row_losses(here, target[part], losses[part], options, **to)
        if any_needs:
            dx = made[0][start:end] if needs[0] else None
            _gradients_of(rows, weight, dlogits[: end - start], ignored, start == 0, dx, *made[1:])
    if late is not None:
        made = [g if g is None else g.mul_(late) for g in made]
    dx, dweight, dbias = (torch.empty(0, **floats) if g is None else g for g in made)
    return losses, dx.view(x.shape) if needs[0] else dx, dweight, dbias


def _divided(dloss, target, ignore_index: int):
    """dloss (1 if None) over the number of rows that count, float32."""
    count = target.new_empty((), dtype=torch.int64)
    add_up(None, target, None, count, ignore_index, False)
    count = count.clamp(min=1)
    return count.float().reciprocal() if dloss is None else dloss / count


def forward(x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, widened, early):
    """(loss, unit_dx, unit_dweight, unit_dbias): the gradients for a dloss of 1, as far as `early` says."""
    dtype, targets = torch.float32 if widened else x.dtype, target.flatten().contiguous()
    options = ignore_index, label_smoothing, z_loss
    with _outside_autocast(x.device):
        mean = reduction == "mean" and any(early) and targets.numel() > 0
        dloss = _divided(None, targets, ignore_index) if mean else None
        losses, *gradients = _run(x, weight, bias, targets, options, dloss, early)
        gradients = [g.to(kept_dtype(x)) for g in gradients]
        if reduction == "none":
            return losses.to(dtype).view(target.shape), *gradients
        loss = torch.zeros((), dtype=dtype, device=x.device)
        if targets.numel():
            count = x.new_empty((), dtype=torch.int64)
            add_up(losses, targets, loss, count, ignore_index, reduction == "mean")
        return loss, *gradients


def backward(
    dloss, x, weight, bias, target, unit_dx, unit_dweight, unit_dbias, ignore_index, label_smoothing, z_loss,
    reduction, early, needs,
):  # fmt: skip
    """(dx, dweight, dbias): what forward computed, scaled, or computed again: with "none" rows differ."""
    dloss = dloss.float().contiguous()
    with _outside_autocast(x.device):
        if all(e or not n for e, n in zip(early, needs, strict=True)):
            factor = dloss.view(1)  # of no axis, it would be rounded to the unit's type
            units = zip((unit_dx, unit_dweight, unit_dbias), needs, strict=True)
            return tuple(
                torch.mul(u, factor, out=x.new_empty(u.shape)) if n else x.new_empty((0,)) for u, n in units
            )
        targets = target.flatten().contiguous()
        if reduction == "mean" and targets.numel():
            dloss = _divided(dloss, targets, ignore_index)
        dloss = dloss.flatten() if reduction == "none" else dloss
        options = ignore_index, label_smoothing, z_loss
        _, *gradients = _run(x, weight, bias, targets, options, dloss, needs)
        return tuple(g.to(x.dtype) for g in gradients)
