"""csrc/cuda's kernels as they are, with every comparison behind a number, and with one comparison flipped.

Launchers stay as they were compiled: a launched kernel's name says which file it is from, and the PTX that is
run instead comes from a copy of csrc.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..ptxsim import cuda_build
from ..ptxsim.machine import Machine
from . import cuda_source, ptx
from .points import Invalid, Point
from .source import Changed, Mutant, digest_of

Asked = Callable[[Point], str | None]  # as Point.wrong

# In a name: of what no other file sees, a hash of its file's path and text; the file; another one.
_OF_FILE = re.compile(r"((?:_GLOBAL__N__|_INTERNAL_))[0-9a-f]{8}(_\d+_(\w+?)_cu_)[0-9a-f]{8}")
_FILE = re.compile(r"(?m)^\s*\.file\b[^\n]*$")


def stable(text: str) -> str:
    """Names without what changes with a file."""
    return _OF_FILE.sub(rf"\g<1>{'0' * 8}\g<2>{'0' * 8}", text)


def told(kernel: str) -> str:
    """A kernel's name for people: no namespaces, no template arguments."""
    at, name = len("_ZN"), kernel
    while match := re.compile(r"\d+").match(kernel, at):
        at = match.end() + int(match.group())
        name = kernel[match.end() : at]
    return name


def _texts(file: Path) -> dict[str, bytes]:
    """Each kernel of a PTX file by its stable name."""
    text = stable(file.read_text())
    files = "\n".join(_FILE.findall(text))  # behind the last kernel
    kept = cuda_build.split(text).items()
    return {name: _FILE.sub("", own.decode()).encode() + files.encode() + b"\n" for name, own in kept}


class _Reached:
    """A profile that notes which basic blocks have been run, and nothing else."""

    def __init__(self):
        self._blocks: dict[int, list] = {}

    def start(self, *launch) -> None:
        """Nothing."""

    def block(self, instructions: list, lanes) -> None:
        """A basic block that `lanes` run."""
        self._blocks[id(instructions)] = instructions

    memory = shared = start

    def text(self) -> bytes:
        """Their PTX."""
        return "\n".join(i.text for block in self._blocks.values() for i in block).encode()


class CudaKernels:
    """What job.py asks about one op's kernels of a backend: here CUDA C++'s."""

    name = "cuda"

    def __init__(self, op: str, arch: str):
        self._op, self._arch = op, arch
        self._sources = {f.stem: f for f in cuda_build.sources()[0]}
        self._plain = functools.cache(lambda stem: _texts(self._kept(stem, "lines", "-lineinfo")))
        self._flips = functools.cache(self._with_flips)
        self._text_of: Callable[[str], dict[str, bytes]] = self._plain
        self._home: dict[str, str] = {}  # the file of each kernel that has been launched

    @staticmethod
    def versions() -> dict[str, str]:
        """What the results depend on."""
        said = subprocess.run([cuda_build.nvcc(), "--version"], capture_output=True, text=True).stdout
        return {"nvcc": re.search(r"V([\d.]+)", said)[1], "torch": torch.__version__}

    def program(self, kernel: str, binary: bytes) -> tuple[str, bytes]:
        """A launched kernel's name for people, and the PTX to run."""
        name = stable(kernel)
        if name not in self._home:
            self._home[name] = self._file_of(name)
        return told(name), self._text_of(self._home[name])[name]

    def _file_of(self, name: str) -> str:
        """A file that has the kernel: the one that its name tells, else one that others were from."""
        if match := _OF_FILE.search(name):
            return match.group(3)
        likely = sorted(self._sources, key=lambda s: not told(name).startswith(s))
        return next(s for s in (*self._home.values(), *likely) if name in self._plain(s))

    def paths(self) -> dict[str, str]:
        """The files that hold kernels, by their names."""
        return {f.name: str(f) for f in _files(cuda_build.CSRC)}

    def never(self, launched: set[str]) -> list[str]:
        """Kernels beside those launched that nothing launches."""
        own = {told(name) for stem in self._homes() if stem != "convert" for name in self._plain(stem)}
        return sorted(own - launched)

    def mutants(self, points: list[Point]) -> Iterator[Mutant]:
        """Every change of a comparison that the PTX of what the points launch has left in it."""
        stems = self._homes()
        files = frozenset().union(*(_included(self._sources[s]) for s in stems))
        code = digest_of(*(f.read_text() for f in sorted(files)))
        present, reached = self._numbers(points)
        for file in _files(cuda_build.CSRC):
            for one in cuda_source.comparisons(file):
                if scope := [p for p in points if one.number in present[p.name]]:
                    there = {p.name for p in scope if one.number in reached[p.name]}
                    stages = [
                        functools.partial(self._switched, one, there),
                        functools.partial(self._alone, one, points, there),
                    ]
                    place = (one.function, str(file), one.line, one.what)
                    yield Mutant(*place, (code, file.name, one.line, one.what), scope, stages)

    def _numbers(self, points: list[Point]) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
        """Of each point the comparisons that its kernels have, and those that its threads come to."""
        present, reached = {}, {}
        with self._running(self._flips):
            for point in points:
                profile = _Reached()
                launches, wrong = point.ran(profile)
                if wrong is not None:
                    raise RuntimeError(f"{self._op} {point.name} with comparisons behind numbers: {wrong}")
                for launch in launches:
                    _refuse_jumps(launch.binary)
                present[point.name] = {n for la in launches for n in _numbers_in(la.binary)}
                reached[point.name] = _numbers_in(profile.text())
        return present, reached

    @contextmanager
    def _switched(self, one: cuda_source.Comparison, there: set[str]) -> Iterator[Asked]:
        """The comparison is flipped in the kernels that have it, in what has them all behind numbers.

        there: names of the points that come to it; at all others what it gives is as before.
        """

        @functools.cache
        def texts(stem: str) -> dict[str, bytes]:
            plain = self._plain(stem)
            return {k: t if one.number in _numbers_in(t) else plain[k] for k, t in self._flips(stem).items()}

        Machine.environment = one.number
        try:
            with self._running(texts):
                yield lambda point: point.wrong() if point.name in there else None
        finally:
            Machine.environment = 0

    @contextmanager
    def _alone(self, one: cuda_source.Comparison, points: list[Point], there: set[str]) -> Iterator[Asked]:
        """It is flipped in the source."""
        with _copied({one.file: cuda_source.flipped(one)}) as csrc:
            affected = [s for s in self._homes() if one.file in _included(self._sources[s])]
            texts = {s: self._plain(s) for s in self._homes()}
            texts |= {s: self._compiled(s, csrc) for s in affected}
            codes = {ptx.digest(text) for own in texts.values() for text in own.values()}
            with self._running(texts.__getitem__):
                launches = [la for p in points for la in p.launches]
                changed = Changed(frozenset(la.code for la in launches if la.code in codes))
                yield lambda point: changed.wrong(point) if point.name in there else changed.spares(point)

    def _homes(self) -> list[str]:
        return sorted({*self._home.values()})

    @contextmanager
    def _running(self, text_of: Callable[[str], dict[str, bytes]]) -> Iterator[None]:
        before, self._text_of = self._text_of, text_of
        try:
            yield
        finally:
            self._text_of = before

    def _compiled(self, stem: str, csrc: Path) -> dict[str, bytes]:
        to = csrc / f"{stem}.ptx"
        try:
            cuda_build.to_ptx(csrc / "cuda" / f"{stem}.cu", self._arch, to, "-lineinfo", headers=csrc)
        except subprocess.CalledProcessError as error:
            raise Invalid(error.stdout) from error
        return _texts(to)

    def _kept(
        self, stem: str, kind: str, *flags, csrc: Path = cuda_build.CSRC, made_from: tuple = ()
    ) -> Path:
        source = csrc / "cuda" / f"{stem}.cu"

        def make(to: Path) -> None:
            cuda_build.to_ptx(source, self._arch, to, *flags, headers=csrc)

        return cuda_build.kept(f"{stem}.{self._arch}.{kind}.ptx", [self._sources[stem], *made_from], make)

    def _with_flips(self, stem: str) -> dict[str, bytes]:
        texts = {f: cuda_source.behind_numbers(f) for f in _files(cuda_build.CSRC)}
        with _copied(texts) as csrc:
            header = csrc / "flips.h"
            header.write_text(cuda_source.FLIPS)
            made_from = (cuda_source.FLIPS, *(texts[f] for f in sorted(_included(self._sources[stem]))))
            return _texts(self._kept(stem, "flips", "-include", header, csrc=csrc, made_from=made_from))


def _files(csrc: Path) -> list[Path]:
    return sorted([*(csrc / "cuda").glob("*.cuh"), *(csrc / "cuda").glob("*.cu")])


@functools.cache
def _included(source: Path) -> frozenset[Path]:
    """It, and the files of csrc/cuda that it includes."""
    return frozenset(f for f in cuda_build.included(source) if f.parent == source.parent)


@functools.lru_cache(maxsize=1024)
def _numbers_in(binary: bytes) -> set[int]:
    known = {c.number for f in _files(cuda_build.CSRC) for c in cuda_source.comparisons(f)}
    return known & {int(n) for n in re.findall(rb"(?<![\w.])\d{6,9}(?![\w.])", binary)}


@functools.lru_cache(maxsize=1024)
def _refuse_jumps(binary: bytes) -> None:
    """Raises: RuntimeError where %envreg0 is not only compared for equality with one number after the other.

    A search among numbers would come only to those near what it holds: blocks would not tell what is reached.
    """
    for register in set(re.findall(rb"mov\.u32\s+(%r\d+), %envreg0", binary)):
        uses = re.findall(rb"[^\n]*" + register + rb"(?!\d)[^\n]*", binary)
        for use in uses:
            if b"%envreg0" not in use and not re.search(rb"\bsetp\.(eq|ne)\.", use):
                raise RuntimeError(
                    f"what holds the number of a flip is used otherwise: {use.decode().strip()}"
                )


@contextmanager
def _copied(changed: dict[Path, str]) -> Iterator[Path]:
    """A copy of what kernels are compiled from, with other texts in some files."""
    with tempfile.TemporaryDirectory(prefix="fastlm-csrc-") as folder:
        csrc = Path(folder) / "csrc"
        for part in ("cuda", "contract"):
            shutil.copytree(cuda_build.CSRC / part, csrc / part)
        for header in cuda_build.CSRC.glob("*.h"):
            shutil.copy(header, csrc)
        for file, text in changed.items():
            (csrc / file.relative_to(cuda_build.CSRC)).write_text(text)
        yield csrc
