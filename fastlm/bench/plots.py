"""The results as pictures: bars of ratios, a roofline, growth."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from ..cli.errors import CommandError
from . import machine, results
from .measure import is_fastlm
from .report import peers_in

_BASELINE, _FASTLM, _LOSES = "#b2541f", "#1f5fb2", "#9a9a9a"
_MARKS = {"f32": "o", "bf16": "s", "f16": "^", "f64": "D"}


def write(folder: Path, found: dict) -> list[Path]:
    """Writes the pictures that the results have figures for, each under a temporary name first.

    Returns: their paths. Raises: CommandError where they cannot be written.
    """
    wanted: dict[str, Callable] = {}
    if found["rows"]:
        wanted["bench_ratios.png"] = _ratios
    if peers_in(found["rows"]):
        wanted["bench_peers.png"] = _peers
    if _under_the_roof(found):
        wanted["bench_roofline.png"] = _roofline
    wanted |= {
        f"bench_growth_{c['op']}.png": _growth_of(c) for c in found.get("growth", {}).get("curves", [])
    }
    if found.get("growth", {}).get("threads"):
        wanted["bench_threads.png"] = _threads
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in wanted.items():
            _saved(folder / name, draw(found))
    except OSError as error:
        raise CommandError(f"cannot write {folder}: {error.strerror or error}") from error
    return [folder / name for name in wanted]


def _saved(file: Path, figure) -> None:
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=file.parent) as folder:
        drawn = Path(folder) / file.name
        figure.savefig(drawn, dpi=120)
        os.replace(drawn, file)


def _figure(width: float, height: float, columns: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
        a.grid(alpha=0.3)
        a.set_axisbelow(True)
    return figure, list(axes)


def _rows_to_draw(found: dict) -> list[dict]:
    """The rows of one memory mode: reused if that was measured."""
    modes = [row["memory"] for row in found["rows"]]
    shown = next((mode for mode in ("on", "gpu", "off") if mode in modes), None)
    return [row for row in found["rows"] if row["memory"] == shown]


def _under_the_roof(found: dict) -> list[dict]:
    """The rows with a fastlm side and work of both kinds: a mere copy has no place on a logarithmic axis."""
    return [
        r
        for r in _rows_to_draw(found)
        if r["work"] and all(map(r["work"].get, ("bytes", "flops"))) and r["ratios"]
    ]


def _machine(found: dict) -> str:
    return machine.summary(found["machine"])


def _ratios(found: dict):
    """Bars: how many times as fast as the best baseline, with the quartiles of the rounds."""
    bars = []
    for row in _rows_to_draw(found):
        for side, by_baseline in row["ratios"].items():
            if row["best_baseline"]:
                name = results.title(row) + (f" {side}" if side != "fastlm" else "")
                bars.append((f"{name} / {row['best_baseline']}", by_baseline[row["best_baseline"]]))
    figure, (axes,) = _figure(10, 1.4 + 0.27 * len(bars))
    values = [ratio["of_medians"] for _, ratio in bars]
    spread = [[max(0.0, v - r["quartiles"][0]) for v, (_, r) in zip(values, bars, strict=True)]]
    spread += [[max(0.0, r["quartiles"][1] - v) for v, (_, r) in zip(values, bars, strict=True)]]
    colors = [_FASTLM if value >= 1 else _LOSES for value in values]
    drawn = axes.barh([name for name, _ in bars], values, color=colors, xerr=spread, ecolor="#333333")
    axes.bar_label(drawn, [f"{value:.2f}" for value in values], padding=6, fontsize=8)
    axes.axvline(1.0, color=_BASELINE, linewidth=1.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.tick_params(axis="y", labelsize=8)
    axes.set(
        xlabel="times as fast as the best baseline, named after the stroke;\nlines: the rounds' quartiles"
    )
    axes.set_title(f"fastlm against the best of the others\n{_machine(found)}", fontsize=10)
    return figure


def _fastest(row: dict) -> str:
    """The side of fastlm's that took least."""
    return min(row["ratios"], key=lambda side: row["sides"][side]["median_s"])


def _peers(found: dict):
    """Marks: how many times as fast as each baseline, one row a workload."""
    rows = [row for row in _rows_to_draw(found) if row["ratios"]]
    figure, (axes,) = _figure(10, 1.6 + 0.27 * len(rows))
    torchs = {"eager": "o", "sdpa": "o", "compile": "s"}
    marks = torchs | {"flex": "^", "sdpa_flash": "d", "flash_attn": "D", "liger": "v"}
    for name, mark in marks.items():
        found_at = [(i, row["ratios"][_fastest(row)]) for i, row in enumerate(rows)]
        points = [(by[name]["of_medians"], i) for i, by in found_at if name in by]
        if points:
            axes.plot(*zip(*points, strict=True), mark, label=name, markersize=6, alpha=0.8)
    axes.set_yticks(range(len(rows)), [results.title(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#333333", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8)
    axes.set(xlabel="times as fast as each baseline; of several backends of fastlm's the fastest")
    axes.set_title(f"fastlm against each of the others\n{_machine(found)}", fontsize=10)
    return figure


def _roofline(found: dict):
    """FLOP/s over FLOPs per byte, under the ceilings measured beside the rows: their median and range."""
    rows = _under_the_roof(found)
    figure, (axes,) = _figure(10, 6.5)
    intensities = [r["work"]["flops"] / r["work"]["bytes"] for r in rows]
    span = np.geomspace(min(intensities) / 2, max(intensities) * 3, 200)
    rates = {name: [r["ceilings"][name] for r in rows] for name in ("copy", "mm")}
    low, middle, high = (
        np.minimum(span * pick(rates["copy"]), pick(rates["mm"])) / 1e9 for pick in (min, median, max)
    )
    axes.loglog(span, middle, color="#333333")
    axes.fill_between(span, low, high, color="#333333", alpha=0.12, linewidth=0)
    for number, (row, x) in enumerate(zip(rows, intensities, strict=False), 1):
        side = min(row["ratios"], key=lambda name: row["sides"][name]["median_s"])
        y = row["work"]["flops"] / row["sides"][side]["median_s"] / 1e9
        if row["best_baseline"]:
            torchs = row["work"]["flops"] / row["sides"][row["best_baseline"]]["median_s"] / 1e9
            axes.plot([x, x], [torchs, y], color=_BASELINE, marker="_", markevery=[0], linewidth=0.8)
        title = results.title(row) + (f" {side}" if side != "fastlm" else "")
        told = f"{number}  {title}: {row['share_of_floor'][side]:.2f} of {row['floor']['of']}"
        style = {"marker": _MARKS[row["dtype"]], "linestyle": "none", "markersize": 6, "alpha": 0.8}
        axes.plot(x, y, color=_FASTLM, label=told, **style)
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(5, -3), fontsize=7)
    axes.set(xlabel="FLOPs per byte that must be moved", ylabel="GFLOP/s")
    copied, multiplied = median(rates["copy"]) / 1e9, median(rates["mm"]) / 1e9
    axes.set_title(  # the figure's own title would run into the legend
        "fastlm under this machine's ceilings (median and range):\n"
        f"copy {copied:.1f} GB/s, matmul {multiplied:.0f} GFLOP/s\n{_machine(found)}",
        fontsize=10,
    )
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def _growth_of(curve: dict) -> Callable:
    def draw(found: dict):
        figure, (time, memory) = _figure(10, 4, 2)
        values = [p["value"] for p in curve["points"]]
        for side in curve["points"][0]["sides"]:
            style = {"color": _FASTLM if is_fastlm(side) else _BASELINE, "marker": "o", "markersize": 4}
            seconds = [p["sides"][side]["median_s"] for p in curve["points"]]
            time.loglog(values, seconds, label=_labelled(curve, side, "time"), **style)
            peaks = [p.get("peaks_mb", {}).get(side, float("nan")) for p in curve["points"]]
            memory.loglog(values, peaks, label=_labelled(curve, side, "memory"), **style)
        time.set(xlabel=curve["of"], ylabel="seconds, forward + backward")
        memory.set(xlabel=curve["of"], ylabel="peak MB beyond inputs and gradients")
        for axes in (time, memory):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.tick_params(axis="x", labelsize=8)
            axes.legend(fontsize=8)
        figure.suptitle(f"{curve['op']} over the {curve['of']}\n{_machine(found)}", fontsize=10)
        return figure

    return draw


def _labelled(curve: dict, side: str, what: str) -> str:
    fitted = curve["exponents"][side].get(what)
    return side if fitted is None else f"{side}: grows with the power {fitted:.2f}"


def _threads(found: dict):
    rows = found["growth"]["threads"]
    figure, (axes,) = _figure(8, 1.4 + 0.27 * len(rows))
    values = [row["ratio"]["of_medians"] for row in rows]
    labels = [f"{row['op']} [{','.join(map(str, row['size']))}]" for row in rows]
    axes.bar_label(
        axes.barh(labels, values, color=_FASTLM), [f"{v:.2f}" for v in values], padding=3, fontsize=8
    )
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.tick_params(axis="y", labelsize=8)
    axes.axvline(1.0, color="#333333", linewidth=1)
    axes.set(xlabel=f"times as fast on {rows[0]['threads']} threads as on one")
    axes.set_title(f"fastlm and threads\n{_machine(found)}", fontsize=10)
    return figure
