"""What decode_attention and append_kv share: tensors [..., ..., ..., dim] as their kernels read them."""

import torch


def readable_rows(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy where its last axis is not contiguous."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def strides_in_units(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """(unit, the first three strides of each in units of it).

    unit: what divides all strides and widths, the elements of 16 bytes of the narrowest; or 1.
    """
    unit, found, all_bits = 16 // min(t.element_size() for t in tensors), [], 0
    for t in tensors:
        first, second, third, _ = t.stride()
        found += (first, second, third)
        all_bits |= first | second | third | t.shape[3]
    return (1, found) if all_bits % unit else (unit, [n // unit for n in found])


def scale_strides(scale: torch.Tensor | None) -> tuple[int, ...]:
    """Those of an int8 cache's scales; 0 where there are none."""
    return (0, 0, 0) if scale is None else scale.stride()
