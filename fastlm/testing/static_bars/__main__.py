"""Compiles the kernels and stores what they are as their limits."""

import argparse
from pathlib import Path

from ..._op import OPS
from .bars import read, worse, write
from .calls import calls_of, landed
from .occupancy import LIMITS
from .record import measured
from .table import write_block


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fastlm.testing.static_bars", description=__doc__)
    parser.add_argument("file", type=Path, help="the JSON file of limits")
    parser.add_argument("--op", action="append", choices=list(OPS), help="this op only, others stay")
    parser.add_argument("--docs", type=Path, help="a page between whose markers their table goes")
    parser.add_argument("--table-only", action="store_true", help="measure nothing, only write the table")
    given = parser.parse_args()
    stored = read(given.file) if given.file.exists() and (given.op or given.table_only) else {}
    if not given.table_only:
        stored = _measure(stored, given.op or [op for op in OPS if landed(op)])
        write(given.file, stored)
    if given.docs:
        write_block(given.docs, stored)


def _measure(stored: dict, names: list[str]) -> dict:
    for op in names:
        found = {}
        for arch in LIMITS:
            found |= measured(arch, calls_of(op))
            print(f"{op} sm_{arch}: {len(found)} kernels so far", flush=True)
        print(*worse({k: v for k, v in stored.items() if k in found}, found), sep="\n")
        stored = {k: v for k, v in stored.items() if k.split()[0] != op} | found
    return {key: stored[key] for op in OPS for key in stored if key.split()[0] == op}


main()
