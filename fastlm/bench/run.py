"""The job of `fastlm bench`: measure what was asked for, with progress, in one process per memory mode."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import cpu
from ..cli.errors import CommandError
from . import machine, plan, registry, results
from .journal import Journal, note
from .options import Options, check
from .trial import check_device_lives, reason_of


def run(options: Options, console: Console, journal: Journal | None = None) -> dict:
    """Measures what was asked for, with progress on the console, and returns a results file's content.

    What fails is noted there, and the rest goes on. journal: where the results so far are kept meanwhile.
    Raises: CommandError where it cannot go on.
    """
    check(options)
    if options.memory == "both":
        return _both(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    journal, begin = journal or Journal(), time.monotonic()
    found = journal.begun(results.empty(machine.facts(options.device), asdict(options)), options.resume)
    planned = [(part, plan.JOBS[part](options, found)) for part in options.parts]  # complains before it lasts
    if options.memory_mode == "on":
        _reuse_memory()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for part, jobs in planned:
            task = progress.add_task(part, total=len(jobs))
            for title, job in jobs:
                progress.update(task, description=f"{title} ({options.memory_mode})")
                if options.limit_s is not None and time.monotonic() - begin >= options.limit_s:
                    found.setdefault("left_out", []).append(title)
                elif title not in found["done"]:
                    _do(title, job, found, journal, options.device)
                progress.advance(task)
            progress.remove_task(task)
    found["rows"].sort(key=_place)
    return found


def _do(title: str, job: Callable[[], None], found: dict, journal: Journal, device: str) -> None:
    """One job between two entries of the journal; an error is noted, and is the end of this job only."""
    found["running"] = title
    journal.save(found)
    try:
        job()
        found["done"].append(title)
    except KeyboardInterrupt:
        del found["running"]  # to be done again by --resume
        journal.save(found)
        raise
    except CommandError:
        raise
    except Exception as error:
        note(found, title, None, reason_of(error))
        check_device_lives(device, reason_of(error))
    del found["running"]
    journal.save(found)


def _place(row: dict) -> int:
    """Where the row's op stands in the table: models last."""
    ops = list(dict.fromkeys(w.op for w in registry.WORKLOADS))
    return ops.index(row["op"]) if row["op"] in ops else len(ops)


def _reuse_memory() -> None:
    try:
        cpu.reuse_memory()
    except RuntimeError as error:
        raise CommandError(f"--memory on: {error}") from error


def _both(options: Options) -> dict:
    """The table with memory reused, then without, in a process each; sweep and growth only with it reused.

    Without it torch.compile is left out: there the claim is that nothing is slower than eager.
    """
    off = replace(
        options, memory="off", parts=["table"], baseline=[b for b in options.baseline if b != "compile"]
    )
    reused = _in_child(replace(options, memory="on", peaks=False))
    if "table" in options.parts:
        reused["rows"] += _in_child(off)["rows"]
    return reused | {"options": asdict(options)}


def _in_child(options: Options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", __name__, json.dumps(asdict(options)), str(file)]
        child = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if child.returncode != 0:
            said = (child.stderr.strip().splitlines() or [f"ended with code {child.returncode}"])[-1]
            raise CommandError(f"memory {options.memory}: {said}")
        return results.read(file)


def _main(options: str, file: str) -> None:
    try:
        results.write(Path(file), run(Options(**json.loads(options)), Console()))
    except CommandError as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # the parent was interrupted too, and says so


if __name__ == "__main__":
    _main(*sys.argv[1:])
