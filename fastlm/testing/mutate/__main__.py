"""python -m fastlm.testing.mutate: `make mutate` in one process, an op after the other."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..._op import OPS
from ..pages import replace_block
from .cuda import CudaKernels
from .job import KINDS, Job
from .report import COLUMNS, equal, markdown, report, shares, totals
from .source import TritonKernels
from .state import State, write_json

KERNELS = {"triton": TritonKernels, "cuda": CudaKernels}
# Masks are the same on all. Triton's barriers are not; nvcc keeps those that are written.
WHOLE = {"triton": {"sm_80": KINDS, "sm_90a": ("ptx",)}, "cuda": {"sm_80": KINDS}}
FILES = {"triton": "", "cuda": "_cuda"}  # behind a file's name
GOAL = 0.95


def main(
    backend: Annotated[str, typer.Option(help="Whose kernels: triton, cuda.")] = "triton",
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given again.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90a; may be given again.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="ptx, source; may be given again.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be given again.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Try survivors of an earlier run again.")] = False,
    every: Annotated[
        bool, typer.Option("--every-dtype", help="Each case in all dtypes, not in one.")
    ] = False,
    apart: Annotated[bool, typer.Option("--apart", help="Change a kernel's variants one by one.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="What has been tried: a run goes on there. In build/ by itself.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the results to this file, or into this folder.")
    ] = None,
    docs: Annotated[Path | None, typer.Option(help="Write them into this page, between its markers.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every mutant.")] = False,
) -> None:
    """Break the kernels, one change at a time, and tell which changes the tests' cases catch.

    Ends with 1 where, of those that some input could show, fewer than 95% are caught, or where a survivor
    has no reason in explained.py or explained_cuda.py.
    """
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    kept = State(state or Path(f"build/mutants{FILES[backend]}.json"))
    torch.set_num_threads(1)
    launched, jobs, flags = set(), [], {"again": again, "every": every, "apart": apart}
    for name in op or [n for n, o in OPS.items() if backend in o.backends]:
        for at in arch or WHOLE[backend]:
            job = Job(name, at, kept, _teller(console, verbose), KERNELS[backend], **flags)
            job.prepare(case)
            launched |= job.launched()
            jobs.append(job.kernels)
            for each in kind or WHOLE[backend].get(at, KINDS):
                job.run(each)
    everything = report(list(kept.records.values()), KERNELS[backend])
    found = report([r for r in kept.records.values() if op is None or r["op"] in op], KERNELS[backend])
    _show(found, console)
    for kernel in sorted({k for kernels in jobs for k in kernels.never(launched)}):
        console.print(f"No case of these ops launches {kernel}")
    if json is not None:
        write_json(json / f"mutation{FILES[backend]}.json" if json.is_dir() else json, everything)
    if docs is not None:
        replace_block(docs, f"mutate{FILES[backend]}", markdown(everything))
    mutants, caught, unexplained, _ = totals(found)
    raise typer.Exit(0 if caught >= GOAL * (mutants - equal(found)) and not unexplained else 1)


def _teller(console: Console, verbose: bool):
    def say(text: str) -> None:
        if verbose or ": caught " not in text:
            console.print(text, markup=False)

    return say


def _show(found: dict, console: Console) -> None:
    table = Table(*COLUMNS)
    for cells in shares(found):
        table.add_row(*cells)
    console.print(table)
    for s in found["survivors"]:
        why = s["reason"] or "NOT EXPLAINED"
        console.print(f"{s['op']} {s['kernel']} {s['where']}: {s['what']}: {why}", markup=False)


if __name__ == "__main__":
    typer.run(main)
