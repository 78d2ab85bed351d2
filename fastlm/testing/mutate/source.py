"""Changes of the source of @triton.jit functions: each comparison flipped, each mask and `other` dropped."""

import ast
import copy
import functools
import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

from .points import SAME, Point

_FLIPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_MASK = {"load": 1, "store": 2}  # the place of its mask among a function's arguments


class Change(NamedTuple):
    """line: of the file. what: in words. text: the function's whole source, changed."""

    line: int
    what: str
    text: str


def functions(package: str = "fastlm_triton") -> list[JITFunction]:
    """All that the package's modules, as far as they are imported, define."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            found |= {id(f): f for f in vars(module).values() if isinstance(f, JITFunction)}
    return [f for f in found.values() if f.module.partition(".")[0] == package.partition(".")[0]]


class Mutant(NamedTuple):
    """One change of a kernel's source, however it is made.

    function, file, line, what: where it is, and in words. key: what it depends on. scope: points that it may
    make a difference to. stages: each makes it and gives Point -> what is wrong; what survives one meets the
    next.
    """

    function: str
    file: str
    line: int
    what: str
    key: tuple
    scope: list[Point]
    stages: list[Callable[[], AbstractContextManager[Callable[[Point], str | None]]]]


class TritonKernels:
    """What job.py asks about one op's kernels of a backend: here Triton's."""

    name = "triton"

    def __init__(self, op: str, arch: str):
        pass

    @staticmethod
    def versions() -> dict[str, str]:
        """What the results depend on."""
        return {"triton": triton.__version__, "torch": torch.__version__}

    def program(self, kernel: str, binary: bytes) -> tuple[str, bytes]:
        """A launched kernel's name, and the PTX to run: as they are."""
        return kernel, binary

    def paths(self) -> dict[str, str]:
        """The files that hold kernels, by their names."""
        return {Path(f.file_name).name: f.file_name for f in functions()}

    def mutants(self, points: list[Point]) -> Iterator[Mutant]:
        """Every change of the source of what the points launch."""
        kernels = {launch.kernel for p in points for launch in p.launches}
        launched = [f for f in functions() if f.__name__ in kernels]
        called = {id(f): f for k in launched for f in called_by(k)}
        code = digest_of(*sorted(f.src for f in called.values()))
        for function in called.values():
            callers = {k.__name__ for k in launched if any(f is function for f in called_by(k))}
            scope = [p for p in points if any(launch.kernel in callers for launch in p.launches)]
            for change in changes(function):
                key = (code, function.__name__, change.text)
                place = (function.__name__, function.file_name, change.line, change.what)
                yield Mutant(*place, key, scope, [functools.partial(_changed, function, change.text)])

    def never(self, launched: set[str]) -> list[str]:
        """Functions beside those launched that nothing launches or calls."""
        used = [c for f in functions() if f.__name__ in launched for c in called_by(f)]
        modules = {f.module for f in functions() if f.__name__ in launched}
        beside = [f for f in functions() if f.module in modules and not any(f is u for u in used)]
        return [f"{f.module.rpartition('.')[2]}.{f.__name__}" for f in beside]


class Changed:
    """One change of the source, which has been made, tried on one point after another.

    same: codes that the change leaves as they are.
    """

    def __init__(self, same: frozenset[str] = frozenset()):
        self._same: set[str] = set(same)

    def wrong(self, point: Point) -> str | None:
        """What is wrong, None if nothing, SAME if the change makes no difference to this point's code."""
        codes = [launch.code for launch in point.launches]
        if self.spares(point):
            return SAME
        launches, found = point.ran()
        if found is not None:
            return found
        changed = [launch.code for launch in launches]
        self._same |= {a for a, b in zip(codes, changed, strict=False) if a == b}
        return SAME if changed == codes else None

    def spares(self, point: Point) -> str | None:
        """SAME if all of this point's code is known to be as before, else None; without a run."""
        return SAME if all(launch.code in self._same for launch in point.launches) else None


@contextmanager
def _changed(function: JITFunction, text: str) -> Iterator[Callable[[Point], str | None]]:
    with replaced(function, text):
        yield Changed().wrong


def digest_of(*parts) -> str:
    """A short hash of their words."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


_called: dict[int, list[JITFunction]] = {}


def called_by(function: JITFunction) -> list[JITFunction]:
    """Itself and all that it calls, directly or not."""
    if id(function) not in _called:
        _called[id(function)] = _all_called_by(function)
    return _called[id(function)]


def _all_called_by(function: JITFunction) -> list[JITFunction]:
    found, new = {}, [function]
    while new:
        at = new.pop()
        if id(at) in found:
            continue
        found[id(at)] = at
        for node in ast.walk(at.parse()):
            if isinstance(node, ast.Name):
                called = at.__globals__.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = getattr(at.__globals__.get(node.value.id), node.attr, None)
            else:
                continue
            if isinstance(called, JITFunction) and called.module.startswith("fastlm_triton"):
                new.append(called)
    return list(found.values())


def changes(function: JITFunction) -> list[Change]:
    """Every change of it, in the order of its lines."""
    found = [c for node in ast.walk(function.parse()) for c in _changes(node, function)]
    return sorted(found, key=lambda c: c.line)


def _changes(node: ast.AST, function: JITFunction) -> Iterator[Change]:
    if isinstance(node, ast.Compare):
        for n, op in enumerate(node.ops):
            if type(op) in _FLIPPED:
                new = copy.deepcopy(node)
                new.ops[n] = _FLIPPED[type(op)]()
                yield _change(function, node, new, f"{ast.unparse(node)} -> {ast.unparse(new)}")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MASK:
        for dropped in ("mask", "other"):
            new = _without(node, dropped, _MASK[node.func.attr])
            if new is not None:
                yield _change(function, node, new, f"{ast.unparse(node)} without {dropped}")


def _without(call: ast.Call, dropped: str, place: int) -> ast.Call | None:
    """The load or store without its mask (and so without what stands for the masked), or without `other`."""
    place += dropped == "other"
    other = call.args[place : place + 1] + [k.value for k in call.keywords if k.arg == "other"]
    if dropped == "other" and other and isinstance(other[0], ast.Constant) and not other[0].value:
        return None  # Triton 3.8 gives 0 where it is not told
    gone = ("mask", "other") if dropped == "mask" else ("other",)
    new = copy.deepcopy(call)
    new.args = new.args[:place]
    new.keywords = [k for k in new.keywords if k.arg not in gone]
    fewer = len(new.args) + len(new.keywords) < len(call.args) + len(call.keywords)
    is_store = call.func.attr == "store"
    return new if fewer and not (is_store and dropped == "other") else None


def _change(function: JITFunction, node: ast.AST, new: ast.AST, what: str) -> Change:
    lines = function.src.encode().splitlines(keepends=True)

    def at(line: int, column: int) -> int:
        return sum(map(len, lines[: line - 1])) + column

    start, end = at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
    whole = b"".join(lines)
    text = (whole[:start] + ast.unparse(new).encode() + whole[end:]).decode()
    return Change(function.def_file_line_number + node.lineno - 1, what, text)


@contextmanager
def replaced(function: JITFunction, text: str) -> Iterator[None]:
    """Inside it the function's source is `text`: whatever calls it is compiled anew."""
    source = function.src
    callers = [f for f in functions() if any(c is function for c in called_by(f))]
    kept = [(f, f.device_caches) for f in callers]
    for f, _ in kept:
        f.device_caches = defaultdict(f.create_binder)
    _set(function, text, callers)
    try:
        yield
    finally:
        _set(function, source, callers)
        for f, caches in kept:
            f.device_caches = caches


def _set(function: JITFunction, text: str, callers: list[JITFunction]) -> None:
    function._unsafe_update_src(text)
    for f in callers:  # their hashes are made of what they call, too
        f.hash = None
