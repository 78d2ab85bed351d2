"""Tries every change of an op's kernels on its cases, and notes which case catches it first."""

import linecache
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import triton

from . import ptx
from .points import ALIKE, SAME, Invalid, Launch, Point, points_of
from .source import TritonKernels, digest_of
from .state import State

KINDS = ("ptx", "source")
CAUGHT, SURVIVED, INVALID = "caught", "survived", "invalid"
_SHORT = 3.0  # seconds: what takes longer is asked of the last stage alone
EQUIVALENT = (SAME, ALIKE)  # no change of what the kernel does: not counted as mutants


class Job:
    """One op on one architecture. kernels: TritonKernels or CudaKernels.

    again: survivors of an earlier run are tried again. every: each case in every dtype. apart: variants of a
    kernel are changed each by itself where their statements differ.
    """

    def __init__(
        self,
        op: str,
        arch: str,
        state: State,
        say: Callable[[str], None],
        kernels=TritonKernels,
        **flags: bool,
    ):
        self.op, self.arch, self.state, self.say = op, arch, state, say
        self.kernels = kernels(op, arch)
        self.again, self.every, self.apart = (flags.get(n, False) for n in ("again", "every", "apart"))
        self.points: list[Point] = []
        self._catchers: list[Point] = []  # the last one first

    def prepare(self, cases: list[str] | None = None) -> None:
        """Runs every case, or these, on the kernels as they are."""
        backend = self.kernels.name, self.kernels.program
        for point in points_of(self.op, self.arch, self.every, cases, *backend):
            try:
                wrong = point.baseline()
            except Invalid as error:
                wrong = str(error)
            if wrong is None:
                self.points.append(point)
            else:
                self.say(f"{self.op} {self.arch} {point.name} is left out: {wrong}")

    def run(self, kind: str) -> None:
        """All mutants of one kind."""
        with tempfile.TemporaryDirectory(prefix="fastlm-mutants-") as folder:
            before, triton.knobs.cache.dir = triton.knobs.cache.dir, folder
            try:
                keys = self._ptx() if kind == "ptx" else self._source()
            finally:
                triton.knobs.cache.dir = before
                self.state.write()
        self.state.keep_only(self.op, self.arch, kind, keys)

    # PTX

    def _ptx(self) -> set[str]:
        groups = groups_of(self.points, self.kernels.paths(), self.apart)
        return {key for group in groups for key in self._group(group)}

    def _group(self, group: "Group") -> set[str]:
        keys = set()
        for at, site in group.sites.items():
            scope = [p for p in group.points if any(at in group.own(launch) for launch in p.launches)]
            for change in ptx.changes(site):
                key = digest_of(self.op, self.arch, group.kernel, *sorted(group.variants), at, change.what)
                facts = {"kind": "ptx", "kernel": group.kernel, "what": change.what}
                facts |= {"where": site.source, "line": group.line(site.source)}
                keys.add(key)
                if not self._known(key, facts, scope):
                    self._try(key, facts, scope, partial(_rewriting, group.rewrite(at, change)))
        return keys

    # Source

    def launched(self) -> set[str]:
        """Names of the kernels that the cases launch."""
        return {launch.kernel for p in self.points for launch in p.launches}

    def _source(self) -> set[str]:
        keys = set()
        for mutant in self.kernels.mutants(self.points):
            key = digest_of(self.op, self.arch, *mutant.key)
            facts = {"kind": "source", "kernel": mutant.function, "what": mutant.what}
            facts |= {"where": f"{Path(mutant.file).name}:{mutant.line}"}
            facts |= {"line": _line(mutant.file, mutant.line)}
            keys.add(key)
            if not self._known(key, facts, mutant.scope) and not self._caught_elsewhere(facts):
                self._try(key, facts, mutant.scope, *mutant.stages)
        return keys

    def _caught_elsewhere(self, facts: dict) -> bool:
        """Whether another op's cases have caught this change of the source: ops share functions."""
        same = ("kind", "kernel", "where", "what")
        caught = (r for r in self.state.records.values() if r["verdict"] == CAUGHT)
        return any(all(r[k] == facts[k] for k in same) for r in caught)

    def _known(self, key: str, facts: dict, scope: list[Point]) -> bool:
        known = self.state.records.get(key)
        if known is None:
            return False
        open_ = known["verdict"] in (SURVIVED, *EQUIVALENT)
        if open_ and (known["points"] != _names(scope) or self.again):
            return False
        self.state.add(key, known | facts)
        return True

    def _try(self, key: str, facts: dict, scope: list[Point], *stages) -> None:
        start = time.perf_counter()
        for stage in stages:
            some = scope if stage is stages[-1] else [p for p in scope if p.seconds <= _SHORT]
            try:
                with stage() as wrong:
                    verdict, how = self._verdict(some, wrong)
            except Invalid as error:
                verdict, how = INVALID, str(error)[-200:]
            if verdict == CAUGHT:
                break
        record = {"op": self.op, "arch": self.arch, **facts, "verdict": verdict, "how": how}
        record |= {"points": _names(scope), "seconds": round(time.perf_counter() - start, 2)}
        self.state.add(key, record)
        told = f"{self.op} {self.arch} {facts['kernel']} {facts['where']}: {facts['what']}: {verdict}"
        self.say(f"{told} {how[:100]}")

    def _verdict(self, scope: list[Point], wrong) -> tuple[str, str]:
        verdict = SAME
        for point in self._in_order(scope):
            try:
                found = wrong(point)
            except Invalid as error:
                return INVALID, str(error)[-200:]
            if found in EQUIVALENT:
                verdict = verdict if verdict == SURVIVED else found
            elif found is not None:
                self._catchers = [point, *(p for p in self._catchers if p is not point)]
                return CAUGHT, f"{point.name}: {found[:200]}"
            else:
                verdict = SURVIVED
        return verdict, ""

    def _in_order(self, scope: list[Point]) -> list[Point]:
        """What caught a change lately comes first, then what is short."""
        lately = [p for p in self._catchers[:3] if any(p is q for q in scope)]
        rest = [p for p in scope if not any(p is q for q in lately)]
        return lately + sorted(rest, key=lambda p: p.seconds)


class Group:
    """Variants of one kernel (dtypes, flags, sizes): a statement that they share is changed in all.

    variants: the sites of each, by its code's digest. sites: all that there are. points: what launches them.
    """

    def __init__(self, kernel: str, paths: dict[str, str]):
        self.kernel, self._paths = kernel, paths
        self.variants: dict[str, dict[tuple, ptx.Site]] = {}
        self.sites: dict[tuple, ptx.Site] = {}
        self.points: list[Point] = []

    def add(self, point: Point, code: str, sites: list[ptx.Site]) -> None:
        """A launch."""
        self.variants[code] = ptx.keyed(sites)
        self.sites = self.variants[code] | self.sites
        if not any(p is point for p in self.points):
            self.points.append(point)

    def own(self, launch: Launch) -> dict[tuple, ptx.Site]:
        """The sites of what was launched, if it is one of these variants."""
        return self.variants.get(launch.code, {}) if launch.kernel == self.kernel else {}

    def line(self, where: str) -> str:
        """The text of a line of source."""
        name, _, number = where.partition(":")
        return _line(self._paths.get(name, ""), int(number or 0))

    def rewrite(self, at: tuple, change: ptx.Change):
        """What the simulator calls: changes these variants at one site, and leaves all others alone."""

        def rewritten(kernel: str, binary: bytes) -> bytes:
            site = self.own(Launch(kernel, ptx.digest(binary), binary)).get(at)
            return binary if site is None else ptx.changed(binary.decode(), site, change).encode()

        return rewritten


def groups_of(points: Iterable[Point], paths: dict[str, str], apart: bool = False) -> list[Group]:
    """Every kernel that was launched, with its variants; apart: those together that have the same sites.

    paths: the files of kernels by their names.
    """
    ours, groups = frozenset(paths), {}
    for point in points:
        for launch in point.launches:
            sites = ptx.sites(launch.binary.decode(), ours)
            key = (launch.kernel, *(ptx.signature(sites) if apart else ()))
            groups.setdefault(key, Group(launch.kernel, paths)).add(point, launch.code, sites)
    return list(groups.values())


@contextmanager
def _rewriting(rewrite) -> Iterator[Callable[[Point], str | None]]:
    yield lambda point: point.rewritten(rewrite)


def _names(points: list[Point]) -> str:
    return digest_of(*sorted(p.name for p in points))


def _line(file: str, number: int) -> str:
    return linecache.getline(file, number).strip() if file else ""
