"""What mutation found, as rows of a table by op and kernel, and each survivor with its reason."""

from collections import defaultdict

from . import explained, explained_cuda
from .job import CAUGHT, EQUIVALENT, INVALID, SURVIVED
from .source import TritonKernels

_NAMES = ("op", "arch", "kind", "kernel")
_COUNTS = ("mutants", "caught", "unexplained", "equivalent")
COLUMNS = (
    "op",
    "kernel",
    "arch",
    "changes of",
    "mutants",
    "caught",
    "share",
    "survivors",
    "unexplained",
    "equivalent",
)


def report(records: list[dict], kernels=TritonKernels) -> dict:
    """Content of the results file: {"schema", "versions", "rows", "survivors"}."""
    reasons = explained.REASONS if kernels is TritonKernels else explained_cuda.REASONS
    records = _once(records)
    rows = defaultdict(lambda: {"mutants": 0, "caught": 0, "unexplained": 0, "equivalent": 0, "seconds": 0.0})
    survivors = []
    for record in records:
        row = rows[tuple(record[n] for n in _NAMES)]
        row["seconds"] += record["seconds"]
        row["equivalent"] += record["verdict"] in EQUIVALENT
        if record["verdict"] not in (CAUGHT, SURVIVED):
            continue
        row["mutants"] += 1
        row["caught"] += record["verdict"] == CAUGHT
        if record["verdict"] == SURVIVED:
            why = explained.explanation(record, reasons)
            row["unexplained"] += why is None
            told = {k: record[k] for k in (*_NAMES, "where", "line", "what")}
            told |= {"reason": why.reason if why else None}
            survivors.append(told | {"equal": True} if why and why.equal else told)
    named = [dict(zip(_NAMES, key, strict=True)) | row for key, row in sorted(rows.items())]
    for row in named:
        row["seconds"] = round(row["seconds"])
    return {"schema": 1, "versions": kernels.versions(), "rows": named, "survivors": survivors}


def _once(records: list[dict]) -> list[dict]:
    """Of source changes that ops share one record: of the op whose cases caught it, else of the first."""
    kept, order = {}, (CAUGHT, SURVIVED, *EQUIVALENT, INVALID)
    for record in sorted(records, key=lambda r: order.index(r["verdict"])):
        if record["kind"] == "source":
            kept.setdefault(_change(record), record)
    return [r for r in records if r["kind"] != "source" or kept[_change(r)] is r]


def _change(record: dict) -> tuple:
    return tuple(record[k] for k in ("arch", "kernel", "where", "what"))


def totals(found: dict) -> tuple[int, int, int, int]:
    """(mutants, caught, survivors without a reason, changes beside them that change nothing)."""
    return tuple(sum(row[k] for row in found["rows"]) for k in _COUNTS)


def equal(found: dict) -> int:
    """Survivors that no input tells from the kernel as it is, as their reasons say."""
    return sum(s.get("equal", False) for s in found["survivors"])


def shares(found: dict) -> list[list[str]]:
    """Cells of the table: one line per kernel and kind of change, and the sum."""
    lines = []
    for row in found["rows"]:
        if row["mutants"]:
            names = [row[k] for k in ("op", "kernel", "arch", "kind")]
            lines.append(names + _counts(*(row[k] for k in _COUNTS)))
    return [*lines, ["all", "", "", "", *_counts(*totals(found))]]


def _counts(mutants: int, caught: int, unexplained: int, equivalent: int) -> list[str]:
    share = f"{100 * caught / mutants:.1f}%" if mutants else ""
    return [
        str(mutants),
        str(caught),
        share,
        *(str(n or "") for n in (mutants - caught, unexplained, equivalent)),
    ]


def markdown(found: dict) -> str:
    """The section of docs/evidence.md."""
    lines = [
        ", ".join(f"{n} {v}" for n, v in found["versions"].items()) + "; made by `make mutate`.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- | --- | --- | --- |" + " --: |" * (len(COLUMNS) - 4),
        *(f"| {' | '.join(cells)} |" for cells in shares(found)),
    ]
    if same := equal(found):
        mutants, caught, _, _ = totals(found)
        share = f"{100 * caught / (mutants - same):.1f}%"
        lines[1:1] = ["", f"{same} survivors are equal for every input; of all others {share} are caught."]
    grouped = defaultdict(list)
    for s in found["survivors"]:
        told = f"{s['kernel']} {s['where']}: `{s['what']}` ({s['op']}, {s['arch']})"
        grouped[s["reason"] or "NOT EXPLAINED"].append(told)
    for reason, told in sorted(grouped.items(), key=lambda item: -len(item[1])):
        lines += ["", f"{reason} ({len(told)}):", "", *(f"- {line}" for line in sorted(set(told)))]
    return "\n".join(lines)
