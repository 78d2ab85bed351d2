"""fastlm doctor: what this machine has, which kernels run on it, and a short test of each against float64."""

import json
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

import fastlm

from .. import _load, _tuned, cpu, ops
from .._op import BACKENDS, OPS
from ..testing.cases import SEEDS, Case, Draw, cases_of
from ..testing.compare import device_of, moved, verdicts
from . import doctor_memory

LIMIT_S = 10.0  # of the self-test: checks that do not fit are counted as not done


def examine(limit_s: float = LIMIT_S) -> dict:
    """Everything that doctor shows, as one dictionary of plain values.

    limit_s: how many seconds the self-test may take.
    """
    return {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "compilers": {"g++": _first_line("g++", "--version"), "nvcc": _last_line("nvcc", "--version")},
        "cuda": _cuda(),
        "triton": _triton(),
        "tuned": _tuned.state(),
        "instruction_set": cpu.instruction_set(),
        "threads": cpu.threads(),
        "reuse_memory": {"here": cpu.memory_statistics()._asdict(), "measured": doctor_memory.gain()},
        "libraries": {name: reason or "loaded" for name, reason in _load.MISSING.items()},
        "kernels": {op: {b: why_not(op, b) for b in BACKENDS} for op in sorted(OPS)},
        "self_test": self_test(limit_s),
    }


def why_not(op: str, backend: str) -> str | None:
    """None if `backend` can run the op's first case where it lives, else the reason."""
    if (reason := _absent(backend)) is not None:
        return reason
    inputs = moved(cases_of(op, backend)[0][0].inputs(Draw(0, torch.float32)), device_of(backend))
    return fastlm.explain(op, **inputs).reasons[backend]


def self_test(limit_s: float) -> dict:
    """Judges every available kernel in every case and dtype by the 2x rule until the time is up.

    Returns: "checks" done, "of" all, "seconds", and "failed": a line per check that broke the rule or raised.
    """
    start, planned, failed, done = time.perf_counter(), _planned(), [], 0
    for op, backend, case, dtype in planned:
        if time.perf_counter() - start > limit_s:
            break
        done += 1
        name = f"{op}.{backend} {case.name} {str(dtype).removeprefix('torch.')}"
        failed += [f"{name}: {line}" for line in _broken(op, backend, case, dtype)]
    seconds = round(time.perf_counter() - start, 1)
    return {"checks": done, "of": len(planned), "seconds": seconds, "failed": failed}


def _absent(backend: str) -> str | None:
    """Why no op can run on a backend here, or None."""
    if backend == "triton" and not torch.cuda.is_available() and _load.MISSING[backend] is None:
        return "Triton's kernels take tensors on an NVIDIA GPU, and torch sees none"
    return _load.MISSING.get(backend)


def _planned() -> list[tuple]:
    """(op, backend, case, dtype): every op's first case comes first, so that a short test meets all ops."""
    found = []
    for op, declared in OPS.items():
        for backend in declared.backends:
            for turn, case in enumerate(cases_of(op, backend)[0]):
                if _absent(backend) is None:
                    found += [(turn, op, backend, case, dtype) for dtype in case.dtypes]
    return [point[1:] for point in sorted(found, key=lambda point: point[0])]


def _broken(op: str, backend: str, case: Case, dtype: torch.dtype) -> list[str]:
    draws = [moved(case.inputs(Draw(seed, dtype)), device_of(backend)) for seed in SEEDS]
    try:
        if fastlm.explain(op, **draws[0]).reasons[backend] is not None:
            return []  # a refusal is no failure: the reference runs it
        found = verdicts(getattr(ops, op), draws, cases_of(op)[1], backend)
        return [str(v) for v in found if not v.ratio <= 1]
    except Exception as error:  # whatever a broken kernel raises is the finding
        return [f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]


def _first_line(*command: str) -> str | None:
    return (_output(*command) or [None])[0]


def _last_line(*command: str) -> str | None:
    return (_output(*command) or [None])[-1]


def _output(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _cuda() -> str | None:
    if not torch.cuda.is_available():
        return None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def show(found: dict, as_json: bool) -> None:
    """Prints what `examine` found: as tables for people, or as JSON only."""
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    table, reasons = _kernel_table(found["kernels"])
    console.print(_machine_table(found), table)
    console.print(*reasons, sep="\n", end="\n" * bool(reasons), highlight=False, markup=False, soft_wrap=True)
    test = found["self_test"]
    console.print(
        f"Self-test against float64: {test['checks']} of {test['of']} checks in {test['seconds']} s,"
        f" {len(test['failed'])} failed",
        highlight=False,
    )
    for line in test["failed"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True, style="red")


def _machine_table(found: dict) -> Table:
    table = Table(show_header=False, box=None)
    for key in ("fastlm", "python", "machine", "torch", "cuda", "triton", "instruction_set", "threads"):
        table.add_row(key.replace("_", " "), str(found[key] or "none"))
    table.add_row("tuned", _tuned_words(found["tuned"]))
    table.add_row("reuse_memory()", _reuse_words(**found["reuse_memory"]))
    for key, value in found["compilers"].items():
        table.add_row(key, value or "none")
    for key, value in found["libraries"].items():
        table.add_row(f"{key} kernels", value)
    return table


def _tuned_words(tuned: dict | None) -> str:
    """What `fastlm tune` found on this GPU, and why it is not used if it is not."""
    if tuned is None:
        return "no GPU with Triton kernels"
    if tuned["ignored"] is not None:
        return f"ignored: {tuned['ignored']}"
    if not tuned["configurations"]:
        return "nothing; fastlm tune finds the fastest configurations for this GPU"
    return f"{tuned['configurations']} configurations, in {tuned['file']}"


def _reuse_words(here: dict, measured: dict) -> str:
    """What reuse_memory() did in this process, and what it does in one of its own."""
    words = "off"
    if here["on"]:
        reused = f"{here['hits']} of {here['hits'] + here['misses']} large tensors from memory used before"
        words = f"on: {reused}, {here['idle'] >> 20} of at most {here['limit'] >> 20} MB idle"
    if "failed" in measured:
        return f"{words}; not measured: {measured['failed']}"
    ms = measured["relu_32_mb_ms"]
    return f"{words}; relu on 32 MB here: {ms['default']} ms without, {ms['reused']} ms with it"


def _kernel_table(kernels: dict) -> tuple[Table, list[str]]:
    """Which kernels can run, and the numbered reasons against the others."""
    reasons: list[str] = []
    table = Table("op", *BACKENDS)

    def cell(op: str, backend: str, reason: str | None) -> str:
        if reason is None:
            return "can run"
        if backend not in OPS[op].backends:
            return "no kernel"
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    for op, why in kernels.items():
        table.add_row(op, *(cell(op, backend, reason) for backend, reason in why.items()))
    return table, [f"({i}) {reason}" for i, reason in enumerate(reasons, 1)]
