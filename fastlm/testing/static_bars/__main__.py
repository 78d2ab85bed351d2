"""Compiles the kernels and stores what they are as their limits."""

import argparse
from pathlib import Path

from ..._op import OPS
from ..pages import replace_block
from .bars import COMPILERS, read, stored_kernels, worse, write
from .calls import calls_of, landed
from .occupancy import LIMITS
from .record import Kernel, measured
from .table import beside, markdown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fastlm.testing.static_bars", description=__doc__)
    parser.add_argument("file", type=Path, help="the JSON file of limits")
    parser.add_argument("--backend", choices=list(COMPILERS), default="triton")
    parser.add_argument("--beside", type=Path, help="Triton's file of limits, to put its figures beside")
    parser.add_argument("--op", action="append", choices=list(OPS), help="this op only, others stay")
    parser.add_argument("--docs", type=Path, help="a page between whose markers their table goes")
    parser.add_argument("--table-only", action="store_true", help="measure nothing, only write the table")
    given = parser.parse_args()
    backend, partly = given.backend, given.file.exists() and (given.op or given.table_only)
    kernels = read(given.file, backend) if partly else {}
    for op in [] if given.table_only else given.op or [op for op in OPS if landed(op)]:
        kernels = _with(op, kernels, backend)
        write(given.file, kernels, backend)
    if given.docs:
        replace_block(given.docs, "bars", markdown(kernels, COMPILERS[backend].release(), backend))
    if given.docs and given.beside:
        replace_block(given.docs, "beside", beside(kernels, stored_kernels(given.beside)))


def _with(op: str, kernels: dict[str, Kernel], backend: str) -> dict[str, Kernel]:
    """The kernels, this op's measured again; in the ops' order."""
    found = {}
    for arch in LIMITS:
        found |= measured(arch, calls_of(op, backend), backend)
        print(f"{op}: {len(found)} kernels, up to sm_{arch}", flush=True)
    for sentence in worse({k: v for k, v in kernels.items() if k in found}, found):
        if "no limits" not in sentence:
            print(sentence)
    others = {key: kernel for key, kernel in kernels.items() if key.split()[0] != op}
    return {key: k for name in OPS for key, k in (others | found).items() if key.split()[0] == name}


main()
