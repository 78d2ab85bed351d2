"""python -m fastlm.testing.mutate: `make mutate` in one process, an op after the other."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..._op import OPS
from ..pages import replace_block
from . import source
from .job import KINDS, Job
from .report import COLUMNS, markdown, report, shares, totals
from .state import State, write_json

WHOLE = {"sm_80": KINDS, "sm_90a": ("ptx",)}  # masks are the same on both; barriers are not
GOAL = 0.95


def main(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given again.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90a; may be given again.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="ptx, source; may be given again.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be given again.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Try survivors of an earlier run again.")] = False,
    every: Annotated[
        bool, typer.Option("--every-dtype", help="Each case in all dtypes, not in one.")
    ] = False,
    apart: Annotated[bool, typer.Option("--apart", help="Change a kernel's variants one by one.")] = False,
    state: Annotated[Path, typer.Option(help="What has been tried: a run goes on there.")] = Path(
        "build/mutants.json"
    ),
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Write them into this page, between its markers.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every mutant.")] = False,
) -> None:
    """Break the Triton kernels, one change at a time, and tell which changes the tests' cases catch.

    Ends with 1 where fewer than 95% are caught, or where a survivor has no reason in explained.py.
    """
    console, kept = Console(soft_wrap=True, highlight=False, emoji=False), State(state)
    torch.set_num_threads(1)
    launched = set()
    for name in op or [n for n, o in OPS.items() if "triton" in o.backends]:
        for at in arch or WHOLE:
            kinds = [k for k in kind or WHOLE.get(at, KINDS) if kind or k in WHOLE.get(at, KINDS)]
            job = Job(name, at, kept, _teller(console, verbose), again=again, every=every, apart=apart)
            job.prepare(case)
            launched |= job.launched()
            for each in kinds:
                job.run(each)
    found = report([r for r in kept.records.values() if op is None or r["op"] in op])
    _show(found, console)
    for kernel in never(launched):
        console.print(f"No case of these ops launches {kernel}")
    if json is not None:
        write_json(json, found)
    if docs is not None:
        replace_block(docs, "mutate", markdown(found))
    mutants, caught, unexplained, _ = totals(found)
    raise typer.Exit(0 if caught >= GOAL * mutants and not unexplained else 1)


def never(launched: set[str]) -> list[str]:
    """Functions beside those launched that nothing launches or calls."""
    functions = source.functions()
    used = [c for f in functions if f.__name__ in launched for c in source.called_by(f)]
    modules = {f.module for f in functions if f.__name__ in launched}
    beside = [f for f in functions if f.module in modules and not any(f is u for u in used)]
    return [f"{f.module.rpartition('.')[2]}.{f.__name__}" for f in beside]


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
