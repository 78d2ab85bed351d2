"""All of `fastlm bench`: measures, shows, and writes what was asked for."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from ..cli.errors import CommandError
from . import docs, machine, plots, registry, report, results
from .journal import Journal
from .measure import is_fastlm
from .models import MODELS, STRESS_TITLE
from .options import Options, check
from .run import run


@dataclass(frozen=True)
class Outputs:
    """json: a file, or a folder in which the file gets its name. source: results to show as they are.

    plot: a folder for pictures. compare: older results. docs: a page whose marked block is written anew.
    """

    json: Path | None = None
    source: Path | None = None
    plot: Path | None = None
    compare: Path | None = None
    docs: Path | None = None


def bench(options: Options, outputs: Outputs, console: Console) -> bool:
    """Does the whole job. Returns: whether all that is fastlm's ran; what failed is in the results.

    Raises: CommandError where it cannot go on, if possible before measuring.
    """
    check(options)
    file = _checked(options, outputs)
    old = results.read(outputs.compare) if outputs.compare else None
    journal = Journal(file)
    if outputs.source:
        found = results.read(outputs.source)
    else:
        found = results.rounded(run(options, console, journal))
    if file is not None:
        results.write(file, found)
        journal.remove()
    _show(found, old, console)
    if file is not None:
        _say(console, f"Wrote {file}")
    if outputs.plot is not None:
        for picture in plots.write(outputs.plot, found):
            _say(console, f"Wrote {picture}")
    if outputs.docs is not None:
        docs.write_block(outputs.docs, found, file or outputs.source)
        _say(console, f"Wrote the table of {outputs.docs}")
    return not any(f["side"] is None or is_fastlm(f["side"]) for f in found.get("failures", []))


def titles() -> list[str]:
    """What can be measured."""
    return [w.title for w in registry.WORKLOADS] + [gpt.title for gpt in MODELS] + [STRESS_TITLE]


def _checked(options: Options, outputs: Outputs) -> Path | None:
    """The file that the results go to; raises where outputs cannot be written: no measuring is in vain."""
    if outputs.plot is not None and find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'fastlm[bench]'")
    file = outputs.json
    if file is not None and file.is_dir():
        facts = machine.facts(options.device)
        file = file / f"{facts['device']}-{facts['date'][:10]}.json"
    if options.resume and file is None:
        raise CommandError("--resume needs --json: the file, or the folder, that the run was to write")
    for folder in (file and file.parent, outputs.plot):
        if folder is not None:
            results.check_folder(folder)
    if outputs.docs is not None:
        docs.check_block(outputs.docs)
        if file is None and outputs.source is None:
            raise CommandError("--docs needs --json or --from: the page names the file of its figures")
    return file


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _show(found: dict, old: dict | None, console: Console) -> None:
    for memory in report.TITLES:
        if any(row["memory"] == memory for row in found["rows"]):
            console.print(report.table(found["rows"], memory))
    if found["rows"]:
        _say(console, report.LEGEND)
    tables = [report.peaks_table(found["rows"]), *report.growth_tables(found.get("growth"))]
    tables += [report.compared_table(old, found)] if old else []
    for table in tables:
        if table is not None:
            console.print(table)
    told = [*report.stress_lines(found["rows"]), *report.sweep_lines(found.get("sweep"))]
    for line in [*told, *report.failure_lines(found)]:
        _say(console, line)
