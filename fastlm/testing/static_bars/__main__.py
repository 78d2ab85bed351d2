"""Compiles the kernels and stores what they are as their limits."""

import argparse
from pathlib import Path

from ..._op import OPS
from ..pages import replace_block
from .bars import read, worse, write
from .calls import calls_of, landed
from .occupancy import LIMITS
from .record import Kernel, measured
from .table import markdown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fastlm.testing.static_bars", description=__doc__)
    parser.add_argument("file", type=Path, help="the JSON file of limits")
    parser.add_argument("--op", action="append", choices=list(OPS), help="this op only, others stay")
    parser.add_argument("--docs", type=Path, help="a page between whose markers their table goes")
    parser.add_argument("--table-only", action="store_true", help="measure nothing, only write the table")
    given = parser.parse_args()
    partly = given.file.exists() and (given.op or given.table_only)
    kernels = read(given.file) if partly else {}
    for op in [] if given.table_only else given.op or [op for op in OPS if landed(op)]:
        kernels = _with(op, kernels)
        write(given.file, kernels)
    if given.docs:
        replace_block(given.docs, "bars", markdown(kernels))


def _with(op: str, kernels: dict[str, Kernel]) -> dict[str, Kernel]:
    """The kernels, this op's measured again; in the ops' order."""
    found = {}
    for arch in LIMITS:
        found |= measured(arch, calls_of(op))
        print(f"{op}: {len(found)} kernels, up to sm_{arch}", flush=True)
    for sentence in worse({k: v for k, v in kernels.items() if k in found}, found):
        if "no limits" not in sentence:
            print(sentence)
    others = {key: kernel for key, kernel in kernels.items() if key.split()[0] != op}
    return {key: k for name in OPS for key, k in (others | found).items() if key.split()[0] == name}


main()
