"""How a kernel is cut: one small pure function per kernel says so, and `fastlm tune` may overrule it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    """block: the tile's sizes, in the order that the config function names. warps, stages: Triton's."""

    block: tuple[int, ...]
    warps: int = 4
    stages: int = 2


TUNED: dict[tuple, Config] = {}  # (config function's name, arch, *sizes) -> what was fastest on this GPU


def config_for(function: Callable[..., Config], device: torch.device, *sizes) -> Config:
    """function(arch, *sizes), or what `fastlm tune` found better for them.

    function: pure; (arch, *sizes) -> Config, arch being 80, 90, 100 or 120. sizes: hashable.
    """
    arch = arch_of(device)
    return TUNED.get((function.__name__, arch, *sizes)) or _default(function, arch, *sizes)


@functools.lru_cache(maxsize=4096)
def _default(function: Callable[..., Config], arch: int, *sizes) -> Config:
    return function(arch, *sizes)


def arch_of(device: torch.device) -> int:
    """The compute capability that Triton compiles for, times ten: 80 for an A100, 90 for an H100."""
    index = device.index  # None: a CPU. device.type takes four times as long
    return _simulated_target() if index is None else _capability(index)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def _simulated_target() -> int:
    return triton.runtime.driver.active.get_current_target().arch


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes 2.6 us on the host, where torch.empty takes 2."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is n or more; triton.next_power_of_2 takes 2.6 us as well."""
    return 1 << (n - 1).bit_length()
