"""Blocks of a page that a command writes: between <!-- name:start --> and <!-- name:end -->."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ..bench.results import write_text


def replace_block(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the page's markers. Raises: ValueError without one of each."""
    begin, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    whole = page.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise ValueError(f"{page} must hold {begin} and, after it, {end}, once each")
    head, _, rest = whole.partition(begin)
    write_text(page, f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def table_command(module: str, name: str, table: Callable[[], str]) -> None:
    """python -m fastlm.testing.<module>: prints the table, and writes it into a page's block."""
    parser = argparse.ArgumentParser(prog=f"python -m fastlm.testing.{module}")
    parser.add_argument("--docs", type=Path, help="a page between whose markers the table goes")
    given = parser.parse_args()
    found = table()
    print(found)
    if given.docs:
        replace_block(given.docs, name, found)
