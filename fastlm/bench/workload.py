"""A workload: an op at one size, beside what its users would write without fastlm."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

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
    many sets of inputs take turns, so that no cache holds them. peak: peak memory is measured too. gpu: the
    size on a GPU, which the CPU's would not fill.
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
    gpu: tuple[int, ...] | None = None

    @property
    def title(self) -> str:
        """Such as "layer_norm gpt2 [4096,768]"."""
        size = f" [{','.join(map(str, self.size))}]" if self.size else ""
        return f"{self.op} {self.name}{size}"

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the arguments that have a gradient."""
        return cases_of(self.op)[1]

    def on(self, device: str) -> "Workload":
        """The workload at the size and in the dtypes that it is measured with on a device."""
        if torch.device(device).type != "cuda":
            return self
        return replace(self, size=self.gpu or self.size, dtypes=("bf16",))

    def arguments(self, dtype: str, device: str = "cpu", seed: int = 0) -> dict:
        """The public function's arguments at this size, the same for the same seed, drawn on the device."""
        with torch.device(device):
            made = self.inputs(Draw(seed, DTYPES[dtype], device), *self.size)
        return made | self.options


def bytes_of(t: Tensor) -> int:
    """The size of a tensor's elements, in bytes."""
    return prod(t.shape) * t.element_size()
