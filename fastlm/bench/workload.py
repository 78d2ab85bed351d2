"""A workload: an op at one size, beside what its users would write without fastlm."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from math import prod

import torch
from torch import Tensor

from .. import ops
from ..testing.cases import Draw, cases_of

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
Step = Callable[[], tuple]  # one timed call; returns the outputs and gradients, which only tests look at


@dataclass(frozen=True)
class Work:
    """What a call must do at least. bytes: every tensor read or written once. flops: of its matmuls.

    bound: the bandwidth that moves the bytes, "copy" (reads and writes) or "read". adds_up: the floor is the
    sum of both times, for a whole training step, instead of the larger one, for an op that overlaps them.
    """

    bytes: float = 0.0
    flops: float = 0.0
    bound: str = "copy"
    adds_up: bool = False

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.bound, self.adds_up)


def _output(output, arguments: dict):
    return output


@dataclass(frozen=True)
class Baseline:
    """call: plain torch, taking the op's arguments by name, or those that `given` makes of them.

    given: the op's arguments -> call's, made before the timing. form: (op's arguments, a tensor in the form
    of the op's output) -> in the baseline's form; unform: the way back. Both are for padded against packed.
    """

    call: Callable
    given: Callable[[dict], dict] = dict
    form: Callable[[dict, Tensor], Tensor] = lambda arguments, t: t
    unform: Callable[[dict, Tensor], Tensor] = lambda arguments, t: t


@dataclass(frozen=True)
class Workload:
    """An op's call at one size.

    inputs: (draw, *size) -> the public function's arguments, and `options` more. small: a size for tests.
    baselines: "eager" or "sdpa" -> what fastlm is compared with. work: (arguments, direction) -> Work, or
    None where a floor says nothing. pick: (the op's output, arguments) -> the tensor that counts. sets: how
    many sets of inputs take turns, so that no cache holds them. peak: peak memory is measured too.
    """

    op: str
    name: str
    inputs: Callable[..., dict]
    size: tuple[int, ...]
    small: tuple[int, ...]
    baselines: dict[str, Baseline]
    work: Callable[[dict, str], Work | None]
    pick: Callable = _output
    directions: tuple[str, ...] = ("both",)
    dtypes: tuple[str, ...] = ("f32",)
    sets: int = 1
    peak: bool = False
    options: dict = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Such as "layer_norm gpt2 [4096,768]"."""
        size = f" [{','.join(map(str, self.size))}]" if self.size else ""
        return f"{self.op} {self.name}{size}"

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the arguments that have a gradient."""
        return cases_of(self.op)[1]

    def arguments(self, dtype: str, device: str = "cpu", seed: int = 0) -> dict:
        """The public function's arguments at this size, the same for the same seed."""
        made = self.inputs(Draw(seed, DTYPES[dtype]), *self.size)
        return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in (made | self.options).items()}


def sides(
    workload: Workload, dtype: str, direction: str, device: str, baselines, backends
) -> dict[str, Step]:
    """Name -> step of everything to be timed in turn: the baselines asked for, then fastlm per backend.

    baselines: of "eager", "sdpa", "compile"; what the workload has not is left out. backends: names, or None
    for automatic choice.
    """
    sets = [workload.arguments(dtype, device, seed) for seed in range(workload.sets)]
    found = {}
    for name, baseline in workload.baselines.items():
        if name in baselines:
            found[name] = _in_turn(workload, baseline, sets, direction)
        if name == "eager" and "compile" in baselines:
            compiled = Baseline(torch.compile(baseline.call, dynamic=False), baseline.given)
            found["compile"] = _in_turn(workload, compiled, sets, direction)
    for backend in backends:
        ours = Baseline(partial(_picked, getattr(ops, workload.op), workload.pick, backend=backend))
        found["fastlm" if backend is None else f"fastlm.{backend}"] = _in_turn(
            workload, ours, sets, direction
        )
    return found


def _picked(function: Callable, pick: Callable, backend: str | None, **arguments):
    return pick(function(**arguments, backend=backend), arguments)


def _in_turn(workload: Workload, side: Baseline, sets: list[dict], direction: str) -> Step:
    """One step that takes the next set of inputs at every call."""
    steps = [_step(side, arguments, workload.differentiable, direction) for arguments in sets]
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
    with torch.no_grad():
        out = side.unform(arguments, call())
    # the same cotangent for every side, so that their gradients can be compared
    dout = Draw(1, out.dtype).normal(*out.shape).to(out.device) if out.dim() else None
    dout = None if dout is None else side.form(arguments, dout)

    def both() -> tuple:
        result = call()
        return (result, *torch.autograd.grad(result, leaves, dout))

    return both


def bytes_of(t: Tensor) -> int:
    """The size of a tensor's elements, in bytes."""
    return prod(t.shape) * t.element_size()
