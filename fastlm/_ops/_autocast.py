"""What torch.autocast does to the operands of a matrix product, for the ops that contain one."""

import torch
from torch import Tensor

from .._op import autocast_is_on


def matmul_operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as torch.matmul sees them: under autocast cast to its dtype, float64 kept."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if not autocast_is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if _is_cast(t) else t for t in tensors)


def _is_cast(t) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
