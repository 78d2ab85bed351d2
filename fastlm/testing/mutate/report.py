"""What mutation found, as rows of a table by op and kernel, and each survivor with its reason."""

from collections import defaultdict

import torch
import triton

from .explained import reason_for
from .job import CAUGHT, SURVIVED


def report(records: list[dict]) -> dict:
    """Content of the results file: {"versions", "rows", "survivors"}."""
    rows = defaultdict(lambda: {"mutants": 0, "caught": 0, "unexplained": 0, "seconds": 0.0})
    survivors = []
    for record in records:
        row = rows[record["op"], record["arch"], record["kind"], record["kernel"]]
        row["seconds"] += record["seconds"]
        if record["verdict"] not in (CAUGHT, SURVIVED):
            continue
        row["mutants"] += 1
        row["caught"] += record["verdict"] == CAUGHT
        if record["verdict"] == SURVIVED:
            reason = reason_for(record)
            row["unexplained"] += reason is None
            told = {k: record[k] for k in ("op", "arch", "kind", "kernel", "where", "line", "what")}
            survivors.append(told | {"reason": reason})
    named = [
        dict(zip(("op", "arch", "kind", "kernel"), key, strict=True))
        | row
        | {"seconds": round(row["seconds"])}
        for key, row in sorted(rows.items())
    ]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"schema": 1, "versions": versions, "rows": named, "survivors": survivors}


def shares(found: dict) -> list[list[str]]:
    """Cells of the table: one line per kernel and kind of change, and the sum."""
    lines = []
    for row in found["rows"]:
        if row["mutants"]:
            left = row["mutants"] - row["caught"]
            lines.append(
                [*(row[k] for k in ("op", "kernel", "arch", "kind")), *_counts(row["mutants"], left)]
            )
            lines[-1].append(str(row["unexplained"] or ""))
    mutants, caught = (sum(row[k] for row in found["rows"]) for k in ("mutants", "caught"))
    unexplained = sum(row["unexplained"] for row in found["rows"])
    return [*lines, ["all", "", "", "", *_counts(mutants, mutants - caught), str(unexplained or "")]]


def _counts(mutants: int, survivors: int) -> list[str]:
    share = f"{100 * (mutants - survivors) / mutants:.1f}%" if mutants else ""
    return [str(mutants), str(mutants - survivors), share, str(survivors or "")]


COLUMNS = ("op", "kernel", "arch", "changes of", "mutants", "caught", "share", "survivors", "unexplained")


def markdown(found: dict) -> str:
    """The section of docs/evidence.md."""
    lines = [
        f"Triton {found['versions']['triton']}, torch {found['versions']['torch']}; made by `make mutate`.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- | --- | --- | --- |" + " --: |" * (len(COLUMNS) - 4),
        *(f"| {' | '.join(cells)} |" for cells in shares(found)),
    ]
    grouped = defaultdict(list)
    for s in found["survivors"]:
        grouped[s["reason"] or "NOT EXPLAINED"].append(
            f"{s['kernel']} {s['where']}: `{s['what']}` ({s['op']})"
        )
    for reason, survivors in sorted(grouped.items(), key=lambda item: -len(item[1])):
        told = sorted(set(survivors))
        lines += ["", f"{reason} ({len(survivors)}):", "", *(f"- {line}" for line in told)]
    return "\n".join(lines)
