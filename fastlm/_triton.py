"""The Triton kernels as bodies of raw ops: loaded at the first call, run on the device of their tensors.

fastlm_triton.<op> has `forward` and `backward`: each takes its schema's arguments and returns its outputs.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import torch

from . import _tuned

_LEAST = (8, 0)  # compute capability: cp.async, bfloat16 and its mma came with it


class _Simulated:
    arch: str | None = None  # what runs CPU tensors now: see simulated()


simulator = _Simulated()


def missing() -> str | None:
    """None if Triton and its kernels can be imported, else the reason."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if find_spec("fastlm_triton") is None:
        return "fastlm_triton was not installed; reinstall with 'pip install --no-build-isolation -e .'"
    return None


@contextmanager
def simulated(arch: str) -> Iterator[None]:
    """Inside it the Triton kernels take CPU tensors: fastlm.testing.ptxsim.device runs them."""
    before, simulator.arch = simulator.arch, arch
    try:
        yield
    finally:
        simulator.arch = before


def device_refusal(first: torch.Tensor, argument: str) -> str | None:
    """Why the Triton kernels cannot take a tensor on this device, or None."""
    if first.is_cuda:
        return _gpu_refusal(first.device.index)
    if first.is_cpu and simulator.arch is not None:
        return None
    return f"takes cuda tensors, {argument} is on {first.device}"


def _gpu_refusal(index: int) -> str | None:
    return _refusal_of(index) if torch.cuda.is_available() else None  # fake tensors need no GPU


# What torch.compiler.assume_constant_result sets, without importing torch._dynamo: that takes 2 s.
_gpu_refusal._dynamo_marked_constant = True


@functools.cache
def _refusal_of(index: int) -> str | None:
    if torch.version.hip:
        return "takes NVIDIA GPUs, this is a ROCm build of torch"
    found = torch.cuda.get_device_capability(index)
    if found >= _LEAST:
        return None
    return f"takes GPUs of compute capability 8.0 and up, cuda:{index} has {found[0]}.{found[1]}"


def body(op: str, function: str) -> Callable:
    """fastlm_triton.<op>.<function>, imported at its first call."""
    loaded: list[Callable] = []

    def run(*args):
        first = args[0] if args[0] is not None else next(a for a in args if isinstance(a, torch.Tensor))
        if not loaded:
            loaded.append(getattr(import_module(f"fastlm_triton.{op}"), function))
            if first.is_cuda:
                _tuned.load(first.device.index)
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return call(args)
        return call(args)

    def call(args: tuple):
        try:
            return loaded[0](*args)
        except Exception as error:
            if not _tuned.dropped(error):
                raise
            return loaded[0](*args)

    return run
