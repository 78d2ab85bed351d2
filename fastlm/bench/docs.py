"""The table of docs/benchmarks.md: made from a results file, so that page and file cannot differ."""

import os
from pathlib import Path

from ..cli.errors import CommandError
from . import results
from .machine import summary
from .report import cells, columns, peers_in, stress_lines, sweep_lines

BEGIN, END = "<!-- bench:start -->", "<!-- bench:end -->"


def check_block(page: Path) -> str:
    """The page's text. Raises: CommandError where it cannot be read or has no marked block."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot read {page}: {error.strerror or error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise CommandError(f"{page} must hold {BEGIN} and, after it, {END}, once each")
    return text


def write_block(page: Path, found: dict, source: Path) -> None:
    """Replaces what stands between the page's markers by the results of the file `source`."""
    head, _, rest = check_block(page).partition(BEGIN)
    link = os.path.relpath(source, page.parent)
    text = f"{head}{BEGIN}\n{markdown(found, link)}\n{END}{rest.partition(END)[2]}"
    results.write_text(page, text)


def markdown(found: dict, source: str) -> str:
    """The rows as the documentation shows them; source: where the file is, as a link from the page."""
    machine = found["machine"]
    lines = [
        f"Measured on {machine['date'][:10]}: {summary(machine)}, fastlm {machine['fastlm']};"
        f" all rounds are in [{source.rpartition('/')[2]}]({source}).",
    ]
    titles = {"on": "Memory reused", "off": "torch's default allocation", "gpu": "On the GPU"}
    for memory, title in titles.items():
        rows = [row for row in found["rows"] if row["memory"] == memory]
        if rows:
            lines += ["", f"**{title}**", "", *_markdown_table(rows)]
    peaks = [row for row in found["rows"] if row.get("peaks_mb")]
    if peaks:
        lines += [
            "",
            "| peak memory beyond inputs and gradients, MB | baseline | fastlm |",
            "| --- | --: | --: |",
        ]
        lines += [
            f"| {results.title(r)} | {r['peaks_mb']['baseline']:.0f} | {r['peaks_mb']['fastlm']:.0f} |"
            for r in peaks
        ]
    told = [*stress_lines(found["rows"]), *_powers(found.get("growth")), *sweep_lines(found.get("sweep"))]
    return "\n".join([*lines, *([""] if told else []), *(f"- {line.strip()}" for line in told)])


def _powers(growth: dict | None) -> list[str]:
    found = []
    for curve in growth["curves"] if growth else []:
        for side, powers in curve["exponents"].items():
            told = " and ".join(
                f"{what} with the power {p:.2f}" for what, p in powers.items() if p is not None
            )
            found.append(f"{curve['op']} over the {curve['of']}, {side}: {told}.")
    return found


def _markdown_table(rows: list[dict]) -> list[str]:
    names = columns(rows)
    lines = [f"| {' | '.join(names)} |", "| --- |" + " --: |" * (len(names) - 1)]
    return lines + [f"| {' | '.join(line)} |" for row in rows for line in cells(row, peers_in(rows))]
