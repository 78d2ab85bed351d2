"""The dtypes that torch.autocast gives to what the modules compute."""

from torch import Tensor, is_autocast_enabled

_FLOAT32_ON_CPU = ("cross_entropy",)  # of the ops that ask here, the one that the CPU's rules widen


def as_autocast(op: str, x: Tensor) -> Tensor:
    """x in the dtype in which torch computes `op`: float32 under autocast, where the device says so."""
    kind = x.device.type
    widened = x.itemsize < 4 and is_autocast_enabled(kind) and (kind != "cpu" or op in _FLOAT32_ON_CPU)
    return x.float() if widened else x
