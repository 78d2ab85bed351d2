"""The options of `fastlm tune`; what it does is in fastlm.tune."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from .errors import CommandError, one_line_errors

Op = Annotated[list[str] | None, typer.Option(help="Only this op; may be given again.")]
Part = Annotated[
    str,
    typer.Option("--workload", "-k", help="Only what `fastlm bench --list` shows with this in its title."),
]
Dtype = Annotated[list[str] | None, typer.Option(help="f32, bf16, f16; by default bf16; may be given again.")]
Size = Annotated[
    str | None, typer.Option(help="Your own size instead of the workload's, such as 8192,4096; see --list.")
]
Device = Annotated[str, typer.Option(help="A GPU as torch names it.")]
Rounds = Annotated[int, typer.Option(help="Rounds of each candidate, taken in turn.")]
Limit = Annotated[float | None, typer.Option(help="Seconds after which no new search is begun.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the candidates; compile and time nothing.")]
Arch = Annotated[int | None, typer.Option(help="With --dry-run, where there is no GPU: 80, 90, 100 or 120.")]
Forget = Annotated[bool, typer.Option("--forget", help="Remove what was tuned for this GPU.")]


def tune(
    op: Op = None,
    workload: Part = "",
    dtype: Dtype = None,
    size: Size = None,
    device: Device = "cuda",
    rounds: Rounds = 5,
    limit: Limit = None,
    dry_run: DryRun = False,
    arch: Arch = None,
    forget: Forget = False,
) -> None:
    """Find the fastest configurations of the Triton kernels on this GPU, and keep them for later processes.

    Each candidate must give what the default gives. The findings are kept per GPU, Triton and fastlm, in
    ~/.cache/fastlm/tuned (or below $XDG_CACHE_HOME), and loaded when a Triton kernel is first used.
    """
    with one_line_errors("tune"):
        from ..tune import job

        options = job.Options(
            op or [],
            workload,
            dtype or [],
            _sizes(size),
            device,
            rounds,
            limit,
            dry_run,
            forget,
            arch,
        )
        if not job.run(options, Console(width=None if sys.stdout.isatty() else 120)):
            raise typer.Exit(1)


def _sizes(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise CommandError(f"--size must be numbers with commas between, got {text}") from error
