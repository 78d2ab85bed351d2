"""The sides of a row: baselines, peers and fastlm, each as a step to be timed in turn with the others."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from .. import ops
from ..testing.cases import Draw
from . import peers
from .workload import Baseline, Step, Workload


def calls(workload: Workload, baselines, backends) -> dict[str, Callable[[], Baseline]]:
    """Name -> what makes its call, for all that is timed: the baselines asked for, then fastlm's backends.

    baselines: of options.BASELINES; what the workload has not is left out. backends: names, or None for
    automatic choice.
    """
    found: dict[str, Callable[[], Baseline]] = {}
    for name, baseline in workload.baselines.items():
        if name in baselines:
            found[name] = partial(_same, baseline)
        if name == "eager" and "compile" in baselines:
            found["compile"] = partial(_compiled, baseline)
    found |= {name: make for name, make in peers.of(workload.op, workload.name).items() if name in baselines}
    for backend in backends:
        found["fastlm" if backend is None else f"fastlm.{backend}"] = partial(_fastlm, workload, backend)
    return found


def _same(baseline: Baseline) -> Baseline:
    return baseline


def _compiled(baseline: Baseline) -> Baseline:
    return Baseline(torch.compile(baseline.call, dynamic=False), baseline.given)


def _fastlm(workload: Workload, backend: str | None) -> Baseline:
    return Baseline(partial(_picked, getattr(ops, workload.op), workload.pick, backend=backend))


def _picked(function: Callable, pick: Callable, backend: str | None, **arguments):
    return pick(function(**arguments, backend=backend), arguments)


def builders(
    workload: Workload, dtype: str, direction: str, device: str, baselines, backends
) -> dict[str, Callable[[], tuple[Step, Callable[[Tensor], Tensor]]]]:
    """Name -> what makes its step, and the function that brings its output into the form of fastlm's."""
    sets = [workload.arguments(dtype, device, seed) for seed in range(workload.sets)]

    def built(make: Callable[[], Baseline]):
        side = make()
        steps = [_step(side, arguments, workload.differentiable, direction) for arguments in sets]
        return _in_turn(steps), partial(side.unform, sets[0])

    return {name: partial(built, make) for name, make in calls(workload, baselines, backends).items()}


def sides(
    workload: Workload, dtype: str, direction: str, device: str, baselines, backends
) -> dict[str, Step]:
    """Name -> step of each of `calls`."""
    made = builders(workload, dtype, direction, device, baselines, backends)
    return {name: build()[0] for name, build in made.items()}


def _in_turn(steps: list[Step]) -> Step:
    """One step that takes the next set of inputs at every call."""
    if len(steps) == 1:
        return steps[0]
    turns: Iterator[Step] = cycle(steps)
    return lambda: next(turns)()


def _step(side: Baseline, arguments: dict, differentiable: tuple[str, ...], direction: str) -> Step:
    given = {n: t.detach() if isinstance(t, Tensor) else t for n, t in side.given(arguments).items()}
    call = partial(side.call, **given)
    if direction == "forward":
        return lambda: (call(),)
    leaves = [t.requires_grad_() for n, t in given.items() if n in differentiable and isinstance(t, Tensor)]
    cotangents: list[Tensor | None] = []

    def both() -> tuple:
        result = call()
        if not cotangents:  # only now: some peers write into their inputs, so the first call is the right one
            cotangents.append(_cotangent(side, arguments, result.detach()))
        return (result, *torch.autograd.grad(result, leaves, cotangents[0]))

    return both


def _cotangent(side: Baseline, arguments: dict, result: Tensor) -> Tensor | None:
    """The same for every side, so that their gradients can be compared; None for a scalar."""
    out = side.unform(arguments, result)
    return side.form(arguments, Draw(1, out.dtype, str(out.device)).normal(*out.shape)) if out.dim() else None
