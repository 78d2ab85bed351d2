"""What decode_attention and append_kv share: tensors [..., ..., ..., dim] as their kernels read them."""

import functools

import torch


def readable_rows(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy where its last axis is not contiguous."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def strides_in_units(*tensors: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """(unit, the first three strides of each in units of it).

    unit: what divides all strides and widths, the elements of 16 bytes of the narrowest; or 1.
    """
    return _in_units(
        min(t.element_size() for t in tensors), *((*t.stride()[:3], t.shape[3]) for t in tensors)
    )


@functools.lru_cache(maxsize=1024)
def _in_units(itemsize: int, *sizes: tuple[int, int, int, int]) -> tuple[int, tuple[int, ...]]:
    unit = 16 // itemsize
    if any(n % unit for each in sizes for n in each):
        unit = 1
    return unit, tuple(n // unit for *strides, _ in sizes for n in strides)


def scale_strides(scale: torch.Tensor | None) -> tuple[int, ...]:
    """Those of an int8 cache's scales; 0 where there are none."""
    return (0, 0, 0) if scale is None else scale.stride()
