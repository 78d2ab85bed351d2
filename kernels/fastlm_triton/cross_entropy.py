"""cross_entropy: (1 - e) * (lse - x_t) + e * (lse - mean(x)) + z * lse^2 for each row of logits x.

Forward: a program takes a row and reads it once, block by block; each lane keeps the maximum and the sum of
exps of what it has seen (Milakov, Gimelshein, "Online normalizer calculation for softmax",
https://arxiv.org/abs/1805.02867), and the lanes are merged at the row's end: no barrier inside the loop. One
program then adds up the rows. Backward: a program takes a block of a row. Bound by memory; floor: forward
reads logits, backward reads logits and writes dlogits; of ignored rows nothing is read.
"""

import torch
import triton
import triton.language as tl

from ._config import Config, cdiv, config_for, next_power_of_2
from ._launch import launch
from ._rows import as_rows

LOWEST = tl.constexpr(-3.4028234663852886e38)  # where a maximum starts: -inf - -inf would be NaN


def row_config(arch: int, itemsize: int, cols: int) -> Config:
    """(columns at a time,): 32 bytes a thread, two 128-bit loads in flight; up to 8 warps a row."""
    block = min(max(next_power_of_2(cols), 128), 8192 // itemsize)
    return Config((block,), warps=max(block * itemsize // 1024, 1))


def total_config(arch: int) -> Config:
    """(rows at a time,): one program adds all; 16 warps hide the memory's latency, 4 rows are 16 bytes."""
    return Config((2048,), warps=16)


@triton.jit
def row_gradient(dloss, count, row, step):
    """The gradient of a row's loss: dloss[row * step] (1 if None), over count (None: not divided)."""
    if dloss is None:
        d = 1.0
    else:
        d = tl.load(dloss + row * step).to(tl.float32)
    if count is not None:
        d = tl.div_rn(d, tl.maximum(tl.load(count), 1).to(tl.float32))
    return d


@triton.jit
def logits_gradient(x, col, target, maximum, exp_sum, d, cols, smoothing, z_loss):
    """d * ((1 + 2 z lse) * p - (1 - e) * onehot(target) - e / cols) of the columns `col`."""
    factor = 1.0
    if z_loss > 0:
        factor = 1.0 + 2.0 * z_loss * (maximum + tl.log(exp_sum))
    scale = tl.div_rn(d * factor, exp_sum)
    spread = tl.div_rn(smoothing, tl.cast(cols, tl.float32))
    taken = tl.where(col == target, 1.0 - smoothing + spread, spread) * d
    return tl.exp(x - maximum) * scale - taken


@triton.jit(do_not_specialize=["ignore_index", "smoothing", "z_loss", "dloss_step"])
def row_losses(
    logits, bias, target, dloss, row_loss, maxima, exp_sums, dlogits, stride, dlogits_stride, cols,
    dloss_step, ignore_index, smoothing, z_loss, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: a row of logits + bias [cols]. maxima, exp_sums: None where not wanted.

    dlogits [rows, cols]: the gradient where dloss[row * dloss_step] (1 if None) is that of the loss; may be
    logits, None if not wanted.
    """
    row = tl.program_id(0).to(tl.int64)
    which = tl.load(target + row)
    used = (which != ignore_index) & (which >= 0) & (which < cols)
    end = tl.where(used, cols, 0)
    logits += row * stride
    picked = tl.load(logits + which, used, 0.0).to(tl.float32)
    if bias is not None:
        picked += tl.load(bias + which, used, 0.0).to(tl.float32)
    # mean(x) is taken around x_t, so that it is as exact as the differences; if that is -inf the loss is inf
    shift = tl.where(tl.abs(picked) < float("inf"), picked, 0.0)
    maximum = tl.full([BLOCK], LOWEST, tl.float32)
    exps, shifted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(0, end, BLOCK):
        inside = start + lane < cols
        x = tl.load(logits + start + lane, inside, float("-inf")).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + start + lane, inside, 0.0).to(tl.float32)
        step = tl.exp(-tl.abs(x - maximum))  # of x, or of the sum so far if x is the new maximum
        exps = tl.where(x > maximum, exps * step + 1.0, exps + step)
        maximum = tl.maximum(maximum, x)
        if SMOOTHING:
            shifted += tl.where(inside, x - shift, 0.0)
    top = tl.max(maximum, 0)
    exp_sum = tl.sum(exps * tl.exp(maximum - top), 0)
    log_sum = tl.log(exp_sum)
    loss = (1.0 - smoothing) * (log_sum - (picked - top))
    if SMOOTHING:
        mean = tl.div_rn(tl.sum(shifted, 0), tl.cast(cols, tl.float32))
        loss += smoothing * (log_sum + (top - shift) - mean)
    if z_loss > 0:
        lse = log_sum + top
        loss += z_loss * lse * lse
    loss = tl.where(used, loss, tl.where(which == ignore_index, 0.0, float("nan")))
    tl.store(row_loss + row, loss)
    top, exp_sum = tl.where(used, top, 0.0), tl.where(used, exp_sum, 1.0)
    if maxima is not None:
        tl.store(maxima + row, top)
        tl.store(exp_sums + row, exp_sum)
    if dlogits is not None:
        dlogits += row * dlogits_stride
        d = row_gradient(dloss, None, row, dloss_step)
        for start in range(0, cols, BLOCK):
            col = start + lane
            x = tl.load(logits + col, col < end, 0.0).to(tl.float32)
            if bias is not None:
                x += tl.load(bias + col, col < end, 0.0).to(tl.float32)
            dx = logits_gradient(x, col, which, top, exp_sum, d, cols, smoothing, z_loss)
            tl.store(dlogits + col, tl.where(used, dx, 0.0), col < cols)


@triton.jit(do_not_specialize=["ignore_index", "smoothing", "z_loss", "dloss_step", "blocks"])
def row_gradients(
    dloss, logits, target, maxima, exp_sums, count, dlogits, stride, cols, blocks, dloss_step, ignore_index,
    smoothing, z_loss, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: one of the `blocks` blocks of a row."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    col = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    which = tl.load(target + row)
    used = (which != ignore_index) & (which >= 0) & (which < cols)
    x = tl.load(logits + row * stride + col, (col < cols) & used, 0.0).to(tl.float32)
    d = row_gradient(dloss, count, row, dloss_step)
    maximum, exp_sum = tl.load(maxima + row), tl.load(exp_sums + row)
    dx = logits_gradient(x, col, which, maximum, exp_sum, d, cols, smoothing, z_loss)
    tl.store(dlogits + row * cols + col, tl.where(used, dx, 0.0), col < cols)


@triton.jit(do_not_specialize=["ignore_index"])
def add_rows(row_loss, target, loss, count, rows, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program: count of the rows that are not ignored; loss (may be None), row_loss' sum or mean."""
    counts, sums = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        counts += (tl.load(target + row, row < rows, ignore_index) != ignore_index).to(tl.int64)
        if loss is not None:
            sums += tl.load(row_loss + row, row < rows, 0.0).to(tl.float64)
    counted = tl.sum(counts, 0)
    tl.store(count, counted)
    if loss is not None:
        total = tl.sum(sums, 0)
        if MEAN:
            total /= tl.maximum(counted, 1).to(tl.float64)
        tl.store(loss, total.to(tl.float32))


def write_row_losses(
    logits, target, row_loss, options, *, bias=None, sums=(None, None), dlogits=None, dloss=None
) -> None:
    """Writes row_loss [rows] of logits [rows, cols] with its stride, and what else is given.

    options: (ignore_index, label_smoothing, z_loss). bias: [cols], added to logits. sums: float32 [rows], the
    maxima and the sums of exps. dlogits: [rows, cols] with its stride; may be logits. dloss: float32, of each
    row or one for all; None: 1.
    """
    rows, cols = logits.shape
    config = config_for(row_config, logits.device, logits.element_size(), cols)
    step = 1 if dloss is not None and dloss.dim() else 0
    strides = logits.stride(0), 0 if dlogits is None else dlogits.stride(0)
    launch(
        row_losses, (rows,),
        logits, bias, target, dloss, row_loss, *sums, dlogits, *strides, cols, step, *options,
        options[1] > 0, *config.block, num_warps=config.warps,
    )  # fmt: skip


def add_up(row_loss, target, loss, count, ignore_index: int, mean: bool) -> None:
    """Writes count and, unless it is None, loss: the sum or the mean of row_loss."""
    config = config_for(total_config, target.device)
    launch(
        add_rows, (1,),
        row_loss, target, loss, count, target.numel(), ignore_index, mean, *config.block,
        num_warps=config.warps,
    )  # fmt: skip


def forward(logits, target, ignore_index, label_smoothing, z_loss, reduction):
    """(loss, maximum and exp_sum of each row, float32; count of the rows that are not ignored, int64)."""
    maximum = logits.new_empty(target.shape, dtype=torch.float32)
    exp_sum = torch.empty_like(maximum)
    count = logits.new_empty((), dtype=torch.int64)
    each, rows, cols = reduction == "none", target.numel(), logits.shape[-1]
    loss = logits.new_empty(target.shape if each else ())
    if rows == 0:
        return loss.zero_(), maximum, exp_sum, count.zero_()
    logits, stride = as_rows(logits)
    target = target.contiguous()
    row_loss = loss if each else torch.empty_like(maximum)
    matrix = logits.as_strided((rows, cols), (stride, 1))
    options = ignore_index, label_smoothing, z_loss
    write_row_losses(matrix, target, row_loss, options, sums=(maximum, exp_sum))
    add_up(row_loss, target, None if each else loss, count, ignore_index, reduction == "mean")
    return loss, maximum, exp_sum, count


def backward(
    dloss, logits, target, maximum, exp_sum, count, ignore_index, label_smoothing, z_loss, reduction
):
    """dlogits, contiguous."""
    dlogits = logits.new_empty(logits.shape)
    rows, cols = target.numel(), logits.shape[-1]
    if rows == 0:
        return dlogits
    logits, stride = as_rows(logits)
    each, config = reduction == "none", config_for(row_config, logits.device, logits.element_size(), cols)
    blocks = cdiv(cols, config.block[0])
    launch(
        row_gradients, (rows * blocks,),
        dloss.contiguous(), logits, target.contiguous(), maximum, exp_sum,
        count if reduction == "mean" else None, dlogits, stride, cols, blocks, int(each), ignore_index,
        label_smoothing, z_loss, *config.block, num_warps=config.warps,
    )  # fmt: skip
    return dlogits
