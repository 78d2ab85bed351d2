"""What the host does to start the Triton kernels, measured without a GPU: the table of docs/evidence.md.

    python -m fastlm.testing.launches [--docs docs/evidence.md]

A null launcher stands where Triton's launcher is: launches cost what Python does before, and nothing runs.
Three sides take turns: the raw op; the raw op with its launches left out, which still reckons strides and
configurations, and makes outputs and scratch memory; and its twin: the same schema and arguments, and a body
that makes the outputs and does nothing else.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch

from .._explain import raw_arguments, raw_backward_arguments
from .._op import OPS, _as_tuple
from .._triton import simulated
from ..bench.clock import CpuClock
from .cases import Draw, cases_of
from .pages import table_command
from .ptxsim.driver import Driver, driven_by, to_ptx

ROUNDS, CALLS = 15, 500
_twins = torch.library.Library("fastlm_twins", "DEF")
_outputs: dict[str, list[Callable]] = {}  # of each twin: what makes them


class Overhead(NamedTuple):
    """Of one raw op: its launches, and microseconds of a call: all of it, without launches, of its twin."""

    launches: int
    call_us: float
    bare_us: float
    twin_us: float

    @property
    def of_a_launch_us(self) -> float:
        """What a launch adds to the raw op, in microseconds."""
        return (self.call_us - self.bare_us) / self.launches


class NullDriver(Driver):
    """A device on which a launch is counted, and nothing else."""

    def __init__(self, arch: int):
        super().__init__(arch, None, "fastlm null launcher")
        self.launches = 0
        self.launcher_cls = lambda source, metadata: self._launch

    def _launch(self, *arguments) -> None:
        self.launches += 1


@functools.cache
def _driver(arch: int) -> NullDriver:
    return NullDriver(arch)


def _twin(raw, outputs: tuple) -> Callable:
    """An op of raw's schema whose body makes new outputs, and does nothing else."""
    schema = str(raw._schema).split("::", 1)[1]
    name = schema[: schema.index("(")].replace(".", "_")
    known = name in _outputs
    _outputs[name] = [functools.partial(torch.empty_like, o) for o in outputs if o is not None]

    def body(*arguments):
        found = [make() for make in _outputs[name]]
        return found[0] if len(found) == 1 else tuple(found) or None

    if not known:
        _twins.define(f"{name}{schema[schema.index('(') :]}")
        _twins.impl(name, body, "CPU")
    return getattr(torch.ops.fastlm_twins, name).default


def measure(name: str, backward: bool = False, arch: int = 80, rounds: int = ROUNDS) -> Overhead:
    """The overhead of an op's first case in bfloat16, forward or backward."""
    op, driver = OPS[name], _driver(arch)
    arguments, _ = raw_arguments(name, **cases_of(name)[0][0].inputs(Draw(0, torch.bfloat16)))
    with driven_by(driver, to_ptx), simulated(f"sm_{arch}"), torch.no_grad():
        raw = op.forward["triton"]
        outputs = _as_tuple(raw(*arguments))
        if backward:
            arguments = raw_backward_arguments(op, arguments, outputs)
            raw = op.backward["triton"]
            outputs = _as_tuple(raw(*arguments))
        driver.launches = 0
        raw(*arguments)
        launches = driver.launches
        twin = _twin(raw, outputs)
        times: list[list[float]] = [[], [], []]
        for _ in range(rounds):
            times[0].append(_seconds(raw, arguments))
            with _no_launches():
                times[1].append(_seconds(raw, arguments))
            times[2].append(_seconds(twin, arguments))
    return Overhead(launches, *(1e6 * median(side) for side in times))


def _seconds(raw, arguments) -> float:
    step = functools.partial(raw, *arguments)
    step()
    return CpuClock().seconds(step, CALLS)


@contextmanager
def _no_launches() -> Iterator[None]:
    """Inside it launch() does nothing."""
    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastlm_triton.") and hasattr(module, "launch"):
                patches.enter_context(mock.patch.object(module, "launch", _nothing))
        yield


def _nothing(*arguments, **options) -> None:
    """Instead of a launch."""


def table() -> str:
    """All ops, as a page shows them."""
    head = ("op", "launches", "us of each", "us of the call", "without launches", "outputs alone")
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for name, op in OPS.items():
        for backward in (False, True):
            if backward and "triton" not in op.backward:
                continue
            found = measure(name, backward)
            title = f"{name}, {'backward' if backward else 'forward'}"
            times = (found.of_a_launch_us, found.call_us, found.bare_us, found.twin_us)
            lines.append(f"| {title} | {found.launches} | {' | '.join(f'{t:.0f}' for t in times)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    table_command("launches", "launches", table)
