"""All of `fastlm tune`: searches, says what it found, and keeps it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import _triton, _tuned
from .._op import OPS
from ..bench import registry
from ..bench.clock import clock_of
from ..bench.options import check_device, no_gpu
from ..bench.trial import DeviceLost, reason_of
from ..bench.workload import DTYPES, Workload
from ..cli.errors import CommandError
from . import search

ARCHS = (80, 90, 100, 120)


@dataclass(frozen=True)
class Options:
    """What the command line asks for; empty lists mean everything.

    size: instead of each chosen workload's. limit_s: no new search begins after so many seconds. arch: what
    dry_run lists for where there is no GPU.
    """

    op: list[str] = field(default_factory=list)
    workload: str = ""
    dtype: list[str] = field(default_factory=list)
    size: tuple[int, ...] = ()
    device: str = "cuda"
    rounds: int = 5
    limit_s: float | None = None
    dry_run: bool = False
    forget: bool = False
    arch: int | None = None


def run(options: Options, console: Console, clock=None) -> bool:
    """Does what the options ask for. Returns: whether every search came to its end.

    clock: what times the candidates, by default the device's. Raises: CommandError where it cannot go on.
    """
    chosen = _chosen(options)
    if options.dry_run:
        _list_candidates(options, chosen, console)
        return True
    gpu = _gpu(options.device)
    if options.forget:
        there = _tuned.forget(gpu)
        _say(console, f"Removed {_tuned.file_of(gpu)}" if there else f"Nothing was tuned for {gpu}")
        return True
    return _search(options, chosen, gpu, clock or clock_of(options.device), console)


def _chosen(options: Options) -> list[tuple[Workload, str]]:
    """(workload, dtype) of all that is to be tuned. Raises: CommandError for what cannot be meant."""
    reason = _triton.missing()
    if reason is not None:
        raise CommandError(reason)
    for name in options.dtype:
        if name not in DTYPES:
            raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {name}")
    if options.arch is not None and options.arch not in ARCHS:
        raise CommandError(f"--arch must be one of {', '.join(map(str, ARCHS))}, got {options.arch}")
    if options.rounds < 1:
        raise CommandError(f"--rounds must be at least 1, got {options.rounds}")
    workloads = [w.on("cuda") for w in registry.chosen(options.op, options.workload)]
    workloads = [w for w in workloads if "triton" in OPS[w.op].backends]
    if not workloads:
        raise CommandError("no workload with a Triton kernel was chosen; see `fastlm bench --list`")
    if options.size:
        workloads = [_sized(w, options.size) for w in workloads]
    return [(w, dtype) for w in workloads for dtype in options.dtype or w.dtypes]


def _sized(workload: Workload, size: tuple[int, ...]) -> Workload:
    if len(size) != len(workload.size) or min(size) < 1:
        told = ",".join(map(str, workload.size))
        raise CommandError(f"--size must have {len(workload.size)} numbers for {workload.op}, as {told}")
    return replace(workload, size=size)


def _gpu(device: str) -> str:
    """The name under which findings are kept. Raises: CommandError where there is no GPU."""
    if _triton.simulator.arch is not None:
        return f"simulated {_triton.simulator.arch}"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"tuning needs a GPU: {no_gpu()}")
    check_device(device)
    if torch.device(device).type != "cuda":
        raise CommandError(f"--device must be a GPU, got {device}: other devices have no Triton kernels")
    return torch.cuda.get_device_name(device)


def _search(options: Options, chosen, gpu: str, clock, console: Console) -> bool:
    begin, seen, whole, found = time.monotonic(), set(), True, []
    for workload, dtype in chosen:
        if options.limit_s is not None and time.monotonic() - begin >= options.limit_s:
            _say(console, f"Left out for want of time: {workload.title} {dtype}")
            whole = False
            continue
        try:
            for outcome in _outcomes(workload, dtype, options, clock, seen, console):
                found.append(outcome)
                file = _keep(gpu, outcome)  # at once: nothing is lost if a later candidate ends the process
        except (DeviceLost, CommandError):
            raise
        except Exception as error:
            _say(console, f"Failed: {workload.title} {dtype}: {reason_of(error)}")
            whole = False
    console.print(_table(found))
    if found:
        _say(console, f"Kept in {file}")
    return whole


def _outcomes(
    workload: Workload, dtype: str, options: Options, clock, seen: set, console: Console
) -> Iterator:
    """What the search finds for each key that the workload's bodies ask for and none did before."""
    with torch.no_grad():
        for body in search.bodies(workload, workload.arguments(dtype, options.device)):
            for key in search.keys_of(body):
                if key in seen:
                    continue
                seen.add(key)
                _say(console, f"{workload.title} {dtype}, {body.part}: {key_words(key)}")
                yield search.search(
                    body, key, clock, options.rounds, options.device, lambda line: _say(console, line)
                )


def _keep(gpu: str, outcome: search.Outcome):
    better = outcome.best != outcome.default
    try:
        return _tuned.merge(gpu, {outcome.key: outcome.best if better else None})
    except TypeError as error:
        raise CommandError(f"{key_words(outcome.key)}: {error}") from error
    except OSError as error:
        raise CommandError(f"cannot write {_tuned.file_of(gpu)}: {error.strerror or error}") from error


def _list_candidates(options: Options, chosen, console: Console) -> None:
    """Every key with its default and the neighbours that a search would begin with; compiles nothing."""
    if options.arch is None and not torch.cuda.is_available():
        raise CommandError("--dry-run needs a GPU, or --arch to list the candidates for: 80, 90, 100 or 120")
    arch = options.arch or search.config_module()._capability(torch.device(options.device).index or 0)
    seen: set[tuple] = set()
    for workload, dtype in chosen:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        arguments = search.fake_arguments(workload, dtype, mode)
        with search.without_launches(arch), mode:
            for body in search.bodies(workload, arguments):
                for key in search.keys_of(body):
                    if key not in seen:
                        seen.add(key)
                        _say(console, f"{workload.title} {dtype}, {body.part}: {key_words(key)}")
                        default = search.default_of(key)
                        _say(console, f"  {search.told(default)} (default)")
                        for candidate in search.neighbours(default):
                            _say(console, f"  {search.told(candidate)}")


def key_words(key: tuple) -> str:
    """Such as "norm_forward_config(90, 4096)"."""
    name, *sizes = key
    return f"{name}({', '.join(str(s).removeprefix('torch.') for s in sizes)})"


def _table(found: list[search.Outcome]) -> Table:
    made = Table("configuration", "default", "fastest", "times as fast", "tried", "refused")
    for outcome in found:
        same = outcome.best == outcome.default
        made.add_row(
            key_words(outcome.key),
            search.told(outcome.default),
            "the default" if same else search.told(outcome.best),
            "" if same else f"{outcome.times_as_fast:.2f}",
            str(outcome.tried),
            str(len(outcome.rejected)),
        )
    return made


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
