"""Which Triton kernels a call launches, compiled as for a GPU; nothing is run. cuda.py: csrc/cuda's."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..._triton import simulated
from ..ptxsim.driver import Driver, driven_by


class Compiled(NamedTuple):
    """A kernel as ptxas made it. name: in the cubin. shared: bytes of a block. threads: of a block."""

    name: str
    cubin: bytes
    shared: int
    threads: int


class _Launches:
    """The `run` of a driver that only writes down what would run: each compiled kernel once, in order."""

    def __init__(self):
        self.seen: dict[Compiled, None] = {}

    def __call__(self, function, grid, threads, given) -> None:
        self.seen[Compiled(function.name, function.binary, function.shared, threads[0])] = None


@functools.cache
def _driver(arch: int) -> tuple[Driver, _Launches]:
    launches = _Launches()
    return Driver(arch, launches, "fastlm static bars"), launches


def launched(arch: int, run: Callable[[], None]) -> list[tuple[str, Compiled]]:
    """(name, what was compiled) of each kernel that `run` launches; a second one of a name is "name 2"."""
    driver, launches = _driver(arch)
    launches.seen = {}
    with driven_by(driver), simulated(f"sm_{arch}"):
        run()
    return numbered((compiled.name, compiled) for compiled in launches.seen)


def numbered(named: Iterable[tuple[str, Compiled]]) -> list[tuple[str, Compiled]]:
    """The same, a second kernel of a name being "name 2"."""
    names, found = Counter(), []
    for name, compiled in named:
        names[name] += 1
        found.append((name if names[name] == 1 else f"{name} {names[name]}", compiled))
    return found
