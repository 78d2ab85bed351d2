"""Changes of the source of @triton.jit functions: each comparison flipped, each mask and `other` dropped."""

import ast
import copy
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from triton.runtime.jit import JITFunction

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
