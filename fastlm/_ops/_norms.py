"""What the norms share: h = dropout(x) + residual, its bad input, and their output."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._philox import row_scales
from . import _check


class NormOutput(NamedTuple):
    """What a norm with a residual returns: y, and h = dropout(x) + residual, the next residual."""

    y: Tensor
    h: Tensor


def normed(x, residual, dropout_p, seed):
    """(h rounded to x's dtype, the same in the dtype to compute in)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(wide)
    if dropout_p > 0:
        h = h * row_scales(seed, x.shape, dropout_p, wide)
    if residual is not None:
        h = h + residual.to(wide)
    h = h.to(x.dtype)
    return h, h.to(wide)


def check(op, x, parameters, eps, residual, dropout_p, seed):
    """(eps, dropout_p, seed) as the schemas take them; raises TypeError or ValueError."""
    _check.floating(op, "x", x)
    cols = x.shape[-1] if x.dim() else 0
    if cols == 0:
        raise ValueError(f"{op}: x must have a last axis of at least one element, got {_check.got(x)}")
    for name, parameter in parameters.items():
        if parameter is not None:
            _check.parameter(op, name, parameter, cols, x)
    if residual is not None:
        _check.like(op, "residual", residual, x, "x")
    eps = _check.number(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    p = _check.probability(op, dropout_p)
    return eps, p, _check.dropout_seed(op, p, seed, x)


def contiguous(x, wanted=True):
    """A fake of what the bindings make: a contiguous tensor like x, or an empty one."""
    return x.new_empty(x.shape if wanted else (0,))
