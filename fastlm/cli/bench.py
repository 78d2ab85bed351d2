"""The options of `fastlm bench`; what it does is in fastlm.bench."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import one_line_errors


def _many(names: str) -> object:
    return Annotated[list[str] | None, typer.Option(help=f"{names}; may be given again.")]


def _flag(name: str, told: str) -> object:
    return Annotated[bool, typer.Option(name, help=told)]


def _path(name: str, told: str) -> object:
    return Annotated[Path | None, typer.Option(name, help=told)]


Part = Annotated[str, typer.Option("--workload", "-k", help="Only what --list shows with this in its title.")]
Memory = Annotated[
    str, typer.Option(help="on: fastlm.cpu.reuse_memory for every side; off: torch's own; both.")
]
Threads = Annotated[int | None, typer.Option(help="Threads; by default torch's number.")]
Device = Annotated[str, typer.Option(help="A torch device.")]
Limit = Annotated[
    float | None, typer.Option(help="Seconds after which nothing new is begun; every op's first come first.")
]
Rounds = Annotated[int, typer.Option(help="Rounds of each side, taken in turn.")]


def bench(
    op: _many("Only this op") = None,
    workload: Part = "",
    model: _many("Only this model: gpt2, gpt2_dropout, stress") = None,
    backend: _many(
        "fastlm's backend; by default, and of models where several are given, what it chooses"
    ) = None,
    baseline: _many(
        "eager, sdpa, compile, on a GPU flex, sdpa_flash, flash_attn, liger;"
        " by default eager and sdpa, on a GPU all"
    ) = None,
    dtype: _many("f32, bf16, f16, f64; by default each workload's own") = None,
    direction: _many("forward, or both: forward + backward") = None,
    device: Device = "cpu",
    rounds: Rounds = 7,
    memory: Memory = "on",
    threads: Threads = None,
    cases: _flag("--cases", "Time the tests' cases, against the reference.") = False,
    sweep: _flag("--sweep", "Small and large sizes: where is automatic choice slower than torch?") = False,
    growth: _flag("--growth", "Time and memory over sequence length, vocabulary and threads.") = False,
    everything: _flag("--all", "Table, sweep and growth, every baseline, both memory modes.") = False,
    quick: _flag("--quick", "3 rounds, a small sweep, short curves.") = False,
    limit: Limit = None,
    resume: _flag("--resume", "Go on where an earlier run with --json and these options ended.") = False,
    json: _path(
        "--json", "Write the results to this file, or under a name of their own into this folder."
    ) = None,
    plot: _path("--plot", "Write bars, roofline and curves as PNG files into this folder.") = None,
    compare: _path("--compare", "Print old / new times beside this older JSON file.") = None,
    source: _path("--from", "Show this JSON file instead of measuring.") = None,
    docs: _path("--docs", "Write the table into this Markdown page, between its markers.") = None,
    listed: _flag("--list", "Print what can be measured, and nothing else.") = False,
) -> None:
    """Time fastlm against torch, in turn in one process, beside this machine's measured ceilings."""
    with one_line_errors("bench"):
        from ..bench import job
        from ..bench.options import TORCH, Options, default_baselines

        if listed:
            print("\n".join(job.titles()))
            return
        parts = [name for name, wanted in (("sweep", sweep), ("growth", growth)) if wanted] or ["table"]
        default = default_baselines(device)
        baselines = list(dict.fromkeys([*TORCH, *default])) if everything else baseline or default
        whole = "both" if everything and not device.startswith("cuda") else memory
        options = Options(
            *(
                op or [],
                workload,
                model or [],
                backend or [],
                baselines,
                dtype or [],
                direction or [],
                device,
            ),
            3 if quick else rounds,
            whole,
            threads,
            ["table", "sweep", "growth"] if everything else parts,
            cases,
            quick,
            limit_s=limit,
            resume=resume,
        )
        outputs = job.Outputs(json, source, plot, compare, docs)
        if not job.bench(options, outputs, Console(width=None if sys.stdout.isatty() else 120)):
            raise typer.Exit(1)
