"""Blocks of a page that a command writes: between <!-- name:start --> and <!-- name:end -->."""

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
