"""A first call of every side: one that fails, or computes something else, costs its own figures only."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from ..cli.errors import CommandError
from .measure import is_fastlm

_UNLIKE = 0.05  # of the largest number: a wrong layout or mask is off by more, rounding by less


class DeviceLost(CommandError):
    """After an error on it, such as an illegal access, the GPU takes no more calls of this process."""


def reason_of(error: BaseException) -> str:
    """An exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def tried(
    builders: dict[str, Callable[[], Callable]], device: str
) -> tuple[dict[str, Callable], dict[str, Tensor], dict[str, str]]:
    """Side -> step, and -> output of its first call, of those that run; and side -> why not of the others.

    Where every backend of fastlm's that was asked for refuses the call, the first one's NotImplementedError
    is raised; where another runs, the refusal is noted.
    """
    steps, outputs, failed = {}, {}, {}
    refusals: list[NotImplementedError] = []
    for name, build in builders.items():
        try:
            step = build()
            outputs[name] = step()[0].detach()
            steps[name] = step
        except Exception as error:
            if isinstance(error, NotImplementedError) and is_fastlm(name):
                refusals.append(error)
            failed[name] = reason_of(error)
            check_device_lives(device, failed[name])
    if refusals and not any(map(is_fastlm, steps)):
        raise refusals[0]
    return steps, outputs, failed


def check_device_lives(device: str, after: str) -> None:
    """Frees what a failed call held. Raises: DeviceLost where the GPU cannot be used any more."""
    gc.collect()  # an exception's frames hold tensors
    if torch.device(device).type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(f"the GPU cannot be used any more after {after}; go on with --resume") from error


def unlike(outputs: dict[str, Tensor]) -> dict[str, str]:
    """Baseline -> by how much its output differs from fastlm's, of those that compute something else.

    outputs: side -> output, all in the form of fastlm's.
    """
    ours = next((t for name, t in outputs.items() if is_fastlm(name)), None)
    found = {}
    for name, t in outputs.items():
        if ours is None or is_fastlm(name):
            continue
        if t.shape != ours.shape:
            found[name] = f"computes something else: {tuple(t.shape)} instead of {tuple(ours.shape)}"
        elif t.numel():
            largest = ours.abs().max().item()
            error = (t.float() - ours.float()).abs().max().item()
            if not error <= _UNLIKE * largest + 1e-6:
                found[name] = (
                    f"computes something else: off by {error:.2g}, where the largest is {largest:.2g}"
                )
    return found
