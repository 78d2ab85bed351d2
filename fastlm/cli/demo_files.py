"""The demo's results on disk: all of them, or none."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CommandError

_BASELINE, _FASTLM = "#b2541f", "#1f5fb2"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden folder inside `out`; what it holds moves into `out` at the end, and goes if anything fails.

    `out` is made if need be, and removed again if it was made here and nothing came into it.
    Raises: CommandError where `out` cannot be written.
    """
    made: list[Path] = []
    folder = None
    try:
        with _writing(out):
            made += [parent for parent in [out, *out.parents] if not parent.exists()]
            out.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".demo-", dir=out))
        yield folder
        with _writing(out):
            for file in sorted(folder.iterdir()):
                os.replace(file, out / file.name)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write {out}: {error.strerror or error}") from error


def write_results(folder: Path, report: dict) -> None:
    """Writes report.json, loss.png and throughput.png. Raises: CommandError where they cannot be written."""
    with _writing(folder.parent):
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _draw_losses(folder / "loss.png", report)
        _draw_throughput(folder / "throughput.png", report)


def _axes(title: str, width: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_losses(file: Path, report: dict) -> None:
    figure, axes = _axes("The same model, the same batches: the loss falls alike", 7)
    steps = range(1, report["steps"] + 1)
    wide = {"color": _BASELINE, "linewidth": 5, "alpha": 0.5, "label": "torch.nn"}  # seen behind the thin one
    thin = {"color": _FASTLM, "linewidth": 1.5, "label": "fastlm"}
    for side, style in (("baseline", wide), ("fastlm", thin)):
        axes.plot(steps, report[side]["losses"], marker="o", markersize=4, **style)
    axes.set(xlabel="training step", ylabel="cross-entropy (nats per token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=144)


def _draw_throughput(file: Path, report: dict) -> None:
    figure, axes = _axes(f"fastlm trains {report['speedup']:.2f} times as fast", 5)
    names = {"baseline": "torch.nn", "fastlm": "fastlm"}
    rates = [report[side]["tokens_per_s"] for side in names]
    labels = [f"{name}\n{report[side]['peak_mb']:,.0f} MB" for side, name in names.items()]
    bars = axes.bar(labels, rates, color=[_BASELINE, _FASTLM], width=0.6)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    axes.set(ylabel="training tokens per second", xlabel="implementation, and the peak memory of its process")
    axes.margins(y=0.15)
    figure.savefig(file, dpi=144)
