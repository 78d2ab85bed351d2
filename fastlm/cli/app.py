"""The commands and their options; what they do is in the other files here."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import fastlm

from .bench import bench
from .errors import one_line_errors
from .tune import tune

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastlm {fastlm.__version__}")
        raise typer.Exit


@app.callback()
def fastlm_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fused Transformer kernels for PyTorch: what runs here, and a proof of it."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    markdown: Annotated[
        bool, typer.Option(help="Print the support matrix as Markdown, and nothing else.")
    ] = False,
) -> None:
    """Say what runs on this machine, or why not, and test every kernel against float64, for ten seconds."""
    from . import doctor as examination
    from .matrix import support_matrix

    if markdown:
        print(support_matrix())
        return
    with one_line_errors("doctor"):
        found = examination.examine()
    examination.show(found, as_json)
    if found["self_test"]["failed"]:
        raise typer.Exit(1)


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 file to train on; Python's help topics by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = 50,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The folder for report.json, loss.png, throughput.png.")] = Path(
        "demo_out"
    ),
) -> None:
    """Swap fastlm into a plain PyTorch GPT, prove it computes the same, train both on real text, compare."""
    with one_line_errors("demo"):
        from . import demo as job

        job.run(job.Options(text, steps, device, out), Console())


app.command()(bench)
app.command()(tune)
