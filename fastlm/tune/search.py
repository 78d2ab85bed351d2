"""The search of `fastlm tune`: neighbours of each kernel's configuration, timed on the user's own GPU.

A kernel's configuration comes from a small function of (arch, sizes). Here a kernel's body runs once to see
for which keys it asks; then, key by key, the neighbours of what the function says are compiled, compared with
the default's results, and timed in turn with it; the search goes on from the fastest while that gains.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from .._explain import raw_arguments, raw_backward_arguments
from .._op import OPS, _as_tuple
from ..bench.clock import interleaved
from ..bench.trial import check_device_lives, reason_of
from ..bench.workload import Workload

LEAST_GAIN = 1.03  # a smaller one is noise, and a configuration of one's own is not worth it
_STEPS = 3  # how often the search goes on from the fastest neighbour


@dataclass(frozen=True)
class Body:
    """A kernel's Python body with its arguments: fastlm_triton.<op>.forward or .backward."""

    op: str
    part: str
    call: Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Outcome:
    """What the search found for a key. times as fast: the default's time over the best one's."""

    key: tuple
    default: tuple
    best: tuple
    times_as_fast: float
    tried: int
    rejected: dict[tuple, str]


def config_module():
    """fastlm_triton._config."""
    return import_module("fastlm_triton._config")


def bodies(workload: Workload, arguments: dict) -> list[Body]:
    """The bodies that a call of the workload runs, forward first; backward takes what forward gives now."""
    op, module = OPS[workload.op], import_module(f"fastlm_triton.{workload.op}")
    raw = list(raw_arguments(workload.op, **arguments)[0])
    found = [Body(op.name, "forward", lambda: _as_tuple(module.forward(*raw)))]
    if "triton" in op.backward and workload.directions != ("forward",):
        given = raw_backward_arguments(op, raw, found[0].call())
        found.append(Body(op.name, "backward", lambda: _as_tuple(module.backward(*given))))
    return found


class _Asked(dict):
    """Stands for TUNED, and notes the keys that are asked for."""

    def get(self, key, default=None):
        """What a dictionary's get gives."""
        self.keys_asked = getattr(self, "keys_asked", {}) | {key: None}
        return super().get(key, default)


def keys_of(body: Body) -> list[tuple]:
    """The keys for which the body asks, in order."""
    with mock.patch.object(config_module(), "TUNED", _Asked()) as asked:
        body.call()
    return list(getattr(asked, "keys_asked", {}))


def default_of(key: tuple):
    """The configuration that the key's own function says. Raises: LookupError where it is not found."""
    name, *sizes = key
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("fastlm_triton.") and callable(getattr(module, name, None)):
            return getattr(module, name)(*sizes)
    raise LookupError(f"no module of fastlm_triton has {name}")


def neighbours(config) -> list:
    """A size of the block or the warps halved or doubled, one stage more or less, a block of other sides."""
    block, found = config.block, []
    for i, size in enumerate(block):
        for other in (size // 2, 2 * size):
            found.append(config._replace(block=(*block[:i], other, *block[i + 1 :])))
    for i in range(len(block) - 1):
        for one, two in ((block[i] // 2, 2 * block[i + 1]), (2 * block[i], block[i + 1] // 2)):
            found.append(config._replace(block=(*block[:i], one, two, *block[i + 2 :])))
    found += [config._replace(warps=w) for w in (config.warps // 2, 2 * config.warps)]
    found += [config._replace(stages=s) for s in (config.stages - 1, config.stages + 1)]
    most = 4 * math.prod(block)
    return [c for c in found if _sensible(c) and math.prod(c.block) <= most]


def _sensible(config) -> bool:
    return min(config.block, default=1) >= 1 and 1 <= config.warps <= 16 and 1 <= config.stages <= 6


@contextmanager
def _set(key: tuple, config) -> Iterator[None]:
    with mock.patch.dict(config_module().TUNED, {key: config}):
        yield


def search(body: Body, key: tuple, clock, rounds: int, device: str, say: Callable[[str], None]) -> Outcome:
    """Looks for something faster than the default for one of the body's keys.

    clock: of fastlm.bench.clock, or one that is told what to say. say: takes each result, as one line.
    """
    default = best = default_of(key)
    with _set(key, default), _filled():
        expected = body.call()
    tried, rejected, gain = {default}, {}, 1.0
    for _ in range(_STEPS):
        candidates = [c for c in neighbours(best) if c not in tried]
        tried |= set(candidates)
        right = []
        for candidate in candidates:
            reason = why_not(body, key, candidate, expected, device)
            if reason is None:
                right.append(candidate)
            else:
                rejected[candidate] = reason
                say(f"  {told(candidate)}: {reason}")
        if not right:
            break
        sides = {config: _with(body, key, config) for config in dict.fromkeys((default, best, *right))}
        times = {config: median(t) for config, t in interleaved(sides, rounds, clock).items()}
        for candidate in right:
            say(f"  {told(candidate)}: {times[default] / times[candidate]:.2f} times as fast")
        fastest = min(right, key=times.get)
        if times[best] / times[fastest] < LEAST_GAIN:
            break
        best, gain = fastest, times[default] / times[fastest]
    return Outcome(key, default, best, gain, len(tried) - 1, rejected)


def _with(body: Body, key: tuple, config) -> Callable[[], tuple]:
    def step() -> tuple:
        with _set(key, config):
            return body.call()

    return step


def why_not(body: Body, key: tuple, config, expected: tuple[Tensor, ...], device: str) -> str | None:
    """None if the body gives with `config` what it gives with the default, else what went wrong."""
    try:
        with _set(key, config), _filled():
            got = body.call()
            return differs(got, expected)
    except Exception as error:  # what a compiler or a launch refuses
        reason = reason_of(error)
    check_device_lives(device, f"{body.op}.{body.part} with {told(config)}: {reason}")
    return reason


def differs(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """None if the results are equal up to roundings: sums may be taken in another order."""
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if g.shape != e.shape:
            return f"output {i} has shape {tuple(g.shape)}, not {tuple(e.shape)}"
        if not g.is_floating_point():
            if not torch.equal(g, e):
                return f"output {i} differs"
        elif g.numel():
            g, e, eps = g.float(), e.float(), torch.finfo(g.dtype).eps
            if not torch.equal(g.isfinite(), e.isfinite()):
                return f"output {i} has NaN or infinity in other places"
            g, e = (torch.where(t.isfinite(), t, 0.0) for t in (g, e))
            error, largest = (g - e).abs().max().item(), e.abs().max().item()
            if error > max(4 * eps, 1e-5) * largest:
                return f"output {i} is off by {error:.2g}, where the largest is {largest:.2g}"
    return None


@contextmanager
def _filled() -> Iterator[None]:
    """Fresh tensors hold NaN: else what a candidate forgot to write may hold the default's right results."""
    on, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn)


def told(config) -> str:
    """Such as "64x32, 4 warps, 2 stages"."""
    block = "x".join(map(str, config.block)) or "no block"
    return f"{block}, {config.warps} warps, {config.stages} stages"


@contextmanager
def without_launches(arch: int) -> Iterator[None]:
    """Inside it bodies on fake tensors compile and launch nothing: only the keys they ask for matter."""
    from triton.runtime.jit import JITFunction

    import_module("fastlm_triton._launch")  # it tells a stand-in by what run() was when it was imported
    with (
        mock.patch.object(JITFunction, "run", lambda *_, **__: None),
        mock.patch.object(config_module(), "_capability", lambda index: arch),
        mock.patch.object(config_module(), "_simulated_target", lambda: arch),
    ):
        yield


def fake_arguments(workload: Workload, dtype: str, mode: FakeTensorMode) -> dict:
    """The workload's arguments as fake tensors on a GPU that need not be there.

    On the CPU where torch is built without CUDA: it writes no fake CUDA tensor in place, as some bodies do.
    """
    try:
        with mode:
            made = workload.arguments(dtype)
    except DataDependentOutputException:  # lengths are drawn: the numbers are needed
        made = workload.arguments(dtype)
    moved: dict[int, Tensor] = {}
    device = "cpu" if torch.version.cuda is None else "cuda:0"
    with mode:
        for value in made.values():
            if isinstance(value, Tensor) and id(value) not in moved:
                moved[id(value)] = mode.from_tensor(value).to(device)
    return {name: moved.get(id(value), value) for name, value in made.items()}
