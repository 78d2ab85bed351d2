"""What `fastlm bench` can be asked for, and what cannot be meant."""

from dataclasses import dataclass, field

import torch

from .._op import BACKENDS
from ..cli.errors import CommandError
from .models import MODEL_NAMES
from .workload import DTYPES

BASELINES = ("eager", "sdpa", "compile")
DIRECTIONS = ("forward", "both")
MEMORY = ("on", "off", "both")


@dataclass(frozen=True)
class Options:
    """What the command line asks for; empty lists mean what each workload has by default.

    parts: of "table", "sweep", "growth". memory: "both" runs each mode in a process of its own. peaks:
    whether peak memory is measured.
    """

    op: list[str] = field(default_factory=list)
    workload: str = ""
    model: list[str] = field(default_factory=list)
    backend: list[str] = field(default_factory=list)
    baseline: list[str] = field(default_factory=lambda: ["eager", "sdpa"])
    dtype: list[str] = field(default_factory=list)
    direction: list[str] = field(default_factory=list)
    device: str = "cpu"
    rounds: int = 7
    memory: str = "on"
    threads: int | None = None
    parts: list[str] = field(default_factory=lambda: ["table"])
    cases: bool = False
    quick: bool = False
    peaks: bool = True


def check(options: Options) -> None:
    """Raises: CommandError for what cannot be meant, before anything is measured."""
    _one_of("--baseline", options.baseline, BASELINES)
    _one_of("--backend", options.backend, BACKENDS)
    _one_of("--dtype", options.dtype, DTYPES)
    _one_of("--direction", options.direction, DIRECTIONS)
    _one_of("--model", options.model, MODEL_NAMES)
    _one_of("--memory", [options.memory], MEMORY)
    for name, count in (("--rounds", options.rounds), ("--threads", options.threads)):
        if count is not None and count < 1:
            raise CommandError(f"{name} must be at least 1, got {count}")
    try:
        torch.zeros(1, device=torch.device(options.device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {options.device} cannot be used: {reason}") from error


def _one_of(option: str, given: list[str], allowed) -> None:
    for name in given:
        if name not in allowed:
            raise CommandError(f"{option} must be one of {', '.join(allowed)}, got {name}")
