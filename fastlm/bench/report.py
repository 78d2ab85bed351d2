"""The results as tables for people."""

from rich.table import Table

from . import results
from .measure import is_fastlm
from .peers import PEERS

COLUMNS = ("work", "best baseline", "fastlm", "eager, SDPA", "compile", "rate", "floor")
LEGEND = (
    "fastlm's time with half the distance of the quartiles; how many times as fast it is as eager or SDPA,"
    " and as torch.compile (* the best baseline); floor: the share of the least time, by the ceilings that"
    " were measured in the same rounds."
)


TITLES = {
    "on": "memory reused (fastlm.cpu.reuse_memory)",
    "off": "torch's default allocation",
    "gpu": "on the GPU",
}


def failure_lines(found: dict) -> list[str]:
    """What failed, and what was left out for want of time."""
    lines = [
        f"Failed: {f['title']}{', ' + f['side'] if f['side'] else ''}: {f['reason']}"
        for f in found.get("failures", [])
    ]
    left = found.get("left_out", [])
    return lines + [f"Left out for want of time: {len(left)}: {'; '.join(left)}"] * bool(left)


def time_of(seconds: float) -> str:
    """Such as "31.0 us", "4.56 ms", "1.23 s"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def rate_of(work: dict | None, floor: dict | None, seconds: float) -> str:
    """What was multiplied or moved in a second: GFLOP/s where matmuls bound it, else GB/s."""
    if not work:
        return "–"
    if "mm" in floor["of"]:
        return f"{work['flops'] / seconds / 1e9:.0f} GFLOP/s"
    return f"{work['bytes'] / seconds / 1e9:.1f} GB/s"


def peers_in(rows: list[dict]) -> list[str]:
    """The baselines beside torch's own that any row has, in one order."""
    return [name for name in PEERS if any(name in row["sides"] for row in rows)]


def columns(rows: list[dict]) -> list[str]:
    """COLUMNS, and one more for each peer, after torch.compile's."""
    after = COLUMNS.index("compile") + 1
    return [*COLUMNS[:after], *peers_in(rows), *COLUMNS[after:]]


def cells(row: dict, peers: list[str] | tuple = ()) -> list[list[str]]:
    """A row's cells, in the order of `columns`: one list per fastlm backend that was measured."""
    best = row["best_baseline"]
    told = f"{time_of(row['sides'][best]['median_s'])} {best}" if best else "–"
    found = []
    for side, ratios in row["ratios"].items():
        seconds = row["sides"][side]
        median, (low, high) = seconds["median_s"], seconds["quartiles_s"]
        name = results.title(row) + (f" {side}" if side != "fastlm" else "")
        marked = {b: f"{r['of_medians']:.2f}{'*' if b == best else ''}" for b, r in ratios.items()}
        share = row["share_of_floor"][side]
        found.append(
            [
                name,
                told,
                f"{time_of(median)} ±{(high - low) / 2 / median:.0%}",
                next((marked[b] for b in ("eager", "sdpa") if b in marked), "–"),
                marked.get("compile", "–"),
                *(marked.get(peer, "–") for peer in peers),
                rate_of(row["work"], row["floor"], median),
                "–" if share is None else f"{share:.2f} {row['floor']['of']}",
            ]
        )
    return found


def table(rows: list[dict], memory: str) -> Table:
    """The rows of one memory mode for the terminal."""
    made = Table(title=TITLES[memory], title_justify="left")
    rows = [row for row in rows if row["memory"] == memory]
    for column in columns(rows):
        made.add_column(column, justify="left" if column == "work" else "right", overflow="fold")
    for row in rows:
        for line in cells(row, peers_in(rows)):
            made.add_row(*line)
    return made


def peaks_table(rows: list[dict]) -> Table | None:
    """Peak memory, inputs and returned gradients left out; None where it was not measured."""
    made = Table("peak memory beyond inputs and gradients, MB", "baseline", "fastlm", "share of baseline")
    for row in rows:
        if row.get("peaks_mb"):
            before, after = (row["peaks_mb"][n] for n in ("baseline", "fastlm"))
            share = f"{after / before:.2f}" if before >= 0.5 else "–"  # of less than a MB it says nothing
            made.add_row(results.title(row), f"{before:,.0f}", f"{after:,.0f}", share)
    return made if made.row_count else None


def stress_lines(rows: list[dict]) -> list[str]:
    """What a confident GPT's step costs beside a fresh one's, per side and memory mode."""
    found = []
    for memory in TITLES:
        steps = {r["workload"]: r for r in rows if r["op"] == "gpt_step" and r["memory"] == memory}
        if not {"fresh", "confident"} <= set(steps):
            continue
        for side, seconds in steps["confident"]["sides"].items():
            times = seconds["median_s"] / steps["fresh"]["sides"][side]["median_s"]
            found.append(
                f"A confident GPT's step costs {times:.2f} of a fresh one's in {side} (memory {memory})."
            )
    return found


def compared(old: dict, new: dict) -> list[tuple[str, str, float]]:
    """(row, side, seconds before / seconds now) of every side that both files have."""
    before = {results.key(row): row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        for side, seconds in row["sides"].items():
            then = before.get(results.key(row), {"sides": {}})["sides"].get(side)
            if then:
                found.append((_label(row), side, then["median_s"] / seconds["median_s"]))
    return found


def _label(row: dict) -> str:
    return f"{results.title(row)}, memory {row['memory']}"


def compared_table(old: dict, new: dict) -> Table:
    """Old over new times; the baselines, which fastlm does not change, show how the machine differs."""
    made = Table("work", "side", "faster than before by")
    for name, side, times in compared(old, new):
        made.add_row(name, side, f"{times:.2f}", style=None if is_fastlm(side) else "dim")
    return made


def growth_tables(found: dict | None) -> list[Table]:
    """Time and memory of each curve's points, and what threads bring."""
    if not found:
        return []
    tables = [_curve_table(curve) for curve in found["curves"]]
    if found["threads"]:
        made = Table("work", "one thread", "all threads", "times as fast")
        for row in found["threads"]:
            seconds = [time_of(row["sides"][n]["median_s"]) for n in ("one", "all")]
            made.add_row(f"{row['op']} {row['workload']}", *seconds, f"{row['ratio']['of_medians']:.2f}")
        tables.append(made)
    return tables


def _curve_table(curve: dict) -> Table:
    names = list(curve["points"][0]["sides"])
    made = Table(
        curve["of"], *(f"{n} time" for n in names), *(f"{n} peak MB" for n in names), title=curve["op"]
    )
    for point in curve["points"]:
        seconds = [time_of(point["sides"][n]["median_s"]) for n in names]
        memory = [f"{point['peaks_mb'][n]:.1f}" if "peaks_mb" in point else "–" for n in names]
        made.add_row(str(point["value"]), *seconds, *memory)
    powers = [curve["exponents"][n].get(what) for what in ("time", "memory") for n in names]
    made.add_row("grows with the power", *("–" if p is None else f"{p:.2f}" for p in powers), style="bold")
    return made


def sweep_lines(points: list[dict] | None) -> list[str]:
    """What the sweep found: how many sizes, and each at which fastlm lost by more than the noise."""
    if not points:
        return []
    lost = [p for p in points if p["slower"]]
    lines = [
        f"Sweep: {len(points)} points, {len(lost)} slower than the best of torch by more than the noise."
    ]
    for p in lost:
        low, high = p["ratio"]["quartiles"]
        lines.append(
            f"  {results.title(p)}, runs on {p['runs_on']}:"
            f" {p['ratio']['of_medians']:.2f} of {p['best_baseline']}'s speed"
            f" (quartiles {low:.2f} to {high:.2f})"
        )
    return lines
