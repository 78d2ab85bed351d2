"""What `fastlm bench` can be asked for, and what cannot be meant."""

from dataclasses import dataclass, field

import torch

from .._op import BACKENDS
from ..cli.errors import CommandError
from . import peers
from .models import MODEL_NAMES
from .workload import DTYPES

TORCH = ("eager", "sdpa", "compile")
BASELINES = (*TORCH, *peers.PEERS)
DIRECTIONS = ("forward", "both")
MEMORY = ("on", "off", "both")


@dataclass(frozen=True)
class Options:
    """What the command line asks for; empty lists mean what each workload has by default.

    parts: of "table", "sweep", "growth". memory: "both" runs each mode in a process of its own. peaks:
    whether peak memory is measured. limit_s: no new measurement begins after so many seconds; every op's
    first come first then. resume: go on where a run that ended early was.
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
    limit_s: float | None = None
    resume: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def memory_mode(self) -> str:
        """What a row says of its memory: on a GPU torch's allocator reuses it for every side."""
        return "gpu" if self.on_gpu else self.memory


def default_baselines(device: str) -> list[str]:
    """Those that are compared with unless told: on a GPU all that are installed."""
    if not device.startswith("cuda"):
        return ["eager", "sdpa"]
    return [*TORCH, *(name for name in peers.PEERS if peers.missing(name) is None)]


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
    if options.limit_s is not None and not options.limit_s >= 0:
        raise CommandError(f"--limit must be at least 0 seconds, got {options.limit_s:g}")
    check_device(options.device)
    if options.on_gpu and options.memory != "on":
        raise CommandError(f"--memory {options.memory} is for CPUs: on a GPU torch always reuses memory")
    for name in options.baseline:
        if name in peers.PEERS and not options.on_gpu:
            raise CommandError(f"--baseline {name} needs a GPU: --device cuda")
        reason = peers.missing(name)
        if reason is not None:
            raise CommandError(f"--baseline {name} {reason}")


def check_device(name: str) -> None:
    """Raises: CommandError in one sentence where no tensor can be made on the device."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise CommandError(f"--device {name} needs a GPU: {no_gpu()}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {name} cannot be used: {reason}") from error


def no_gpu() -> str:
    """Why torch can use no GPU here."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU or no driver here"


def _one_of(option: str, given: list[str], allowed) -> None:
    for name in given:
        if name not in allowed:
            raise CommandError(f"{option} must be one of {', '.join(allowed)}, got {name}")
