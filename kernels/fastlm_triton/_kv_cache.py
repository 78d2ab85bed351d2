"""What decode_attention and append_kv share: tensors [..., ..., ..., dim] as their kernels read them."""

import torch


def readable_rows(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy where its last axis is not contiguous."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def unit_of(x: torch.Tensor, *others: torch.Tensor) -> int:
    """What divides all strides and widths: the elements of 16 bytes of the narrowest, or 1."""
    unit = 16 // min(t.element_size() for t in (x, *others))
    for t in (x, *others):
        first, second, third, _ = t.stride()
        if (first | second | third | t.shape[3]) % unit:
            return 1
    return unit


def strides_in(unit: int, *tensors: torch.Tensor | None) -> list[int]:
    """The first three strides of each, in units; 0 of None."""
    found: list[int] = []
    for t in tensors:
        found += (0, 0, 0) if t is None else [s // unit for s in t.stride()[:3]]
    return found
