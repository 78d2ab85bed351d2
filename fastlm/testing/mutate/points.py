"""An op's cases as mutants meet them: run by the simulator, judged as tests/test_ops.py judges."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton

import fastlm

from ... import ops
from .. import ptxsim
from ..cases import SEEDS, Case, Draw, cases_of
from ..compare import verdicts
from ..ptxsim.order import Order
from ..ptxsim.profile import Profile
from . import ptx

ALIKE, SAME = "ordered alike", "same code"  # changes that change nothing
Program = Callable[[str, bytes], tuple[str, bytes]]


class Launch(NamedTuple):
    """kernel: its name. code: digest of its PTX. binary: the PTX."""

    kernel: str
    code: str
    binary: bytes


class Invalid(Exception):
    """The change gives no kernel that can be run: it is no mutant."""


class Point:
    """One case of an op in one dtype on a backend.

    program: from a launched kernel's name and PTX to its name for people and the PTX to run. launches: what
    it launched unchanged. seconds: what it then took; order: digest of what ordered their accesses. draws: of
    the case's inputs.
    """

    def __init__(
        self,
        op: str,
        case: Case,
        dtype: torch.dtype,
        arch: str,
        backend: str = "triton",
        program: Program = lambda kernel, binary: (kernel, binary),
    ):
        self.op, self.arch, self.dtype, self.backend, self._program = op, arch, dtype, backend, program
        self.name = f"{case.name}-{str(dtype).removeprefix('torch.')}"
        self.case, self.draws = case, [case.inputs(Draw(SEEDS[0], dtype))]
        self.launches: list[Launch] = []
        self.seconds, self.order = 0.0, ""

    def refused(self) -> bool:
        """Whether the op refuses it: then the test asserts only that it does."""
        with ptxsim.device(self.arch):
            return fastlm.explain(self.op, **self.draws[0]).reasons[self.backend] is not None

    def baseline(self) -> str | None:
        """Notes what the unchanged kernels do; returns what is wrong with them, or None."""
        wrong = self.wrong()
        if wrong is not None and len(self.draws) == 1:  # one draw alone may be unlucky
            self.draws = [self.case.inputs(Draw(seed, self.dtype)) for seed in SEEDS]
            wrong = self.wrong()
        if wrong is None:
            start = time.perf_counter()
            self.launches, _, self.order = self._run(None)
            self.seconds = time.perf_counter() - start
        return wrong

    def wrong(self, rewrite=None) -> str | None:
        """None if the tests' judgement is that all is right, else what is wrong. Raises: Invalid."""
        return self._run(rewrite)[1]

    def rewritten(self, rewrite) -> str | None:
        """As wrong(), and ALIKE where nothing is: the change leaves what orders the accesses as it was."""
        _, wrong, order = self._run(rewrite)
        return ALIKE if wrong is None and order == self.order else wrong

    def ran(self, profile: Profile | None = None) -> tuple[list[Launch], str | None]:
        """(launches, what is wrong)."""
        return self._run(None, profile)[:2]

    def _run(self, rewrite, profile: Profile | None = None) -> tuple[list[Launch], str | None, str]:
        launches, order = [], Order()

        def seen(kernel: str, binary: bytes) -> bytes:
            kernel, binary = self._program(kernel, binary)
            launches.append(Launch(kernel, ptx.digest(binary), binary))
            return binary if rewrite is None else rewrite(kernel, binary)

        try:
            device = ptxsim.device(self.arch, profile, rewrite=seen, order=order)
            with device, _at_most(120 + 20 * self.seconds):
                function, differentiable = getattr(ops, self.op), cases_of(self.op)[1]
                found = verdicts(function, self.draws, differentiable, backend=self.backend)
        except ptxsim.UnknownInstruction as error:
            raise Invalid(str(error)) from error
        except Exception as error:
            if isinstance(error, triton.CompilationError) or "PassManager" in str(error):
                raise Invalid(str(error)) from error
            return launches, f"{type(error).__name__} {error}", ""
        wrong = [v for v in found if not v.ratio <= 1]
        return launches, str(wrong[0]) if wrong else None, order.digest()


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError where what runs inside takes longer (of the processor), in a main thread."""

    def stop(*_):
        raise TimeoutError(f"does not end in {seconds:.0f} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def points_of(
    op: str,
    arch: str,
    every: bool = False,
    cases: list[str] | None = None,
    backend="triton",
    *program: Program,
) -> Iterator[Point]:
    """Those that are not refused: on sm_80 each case in one dtype, in turn; on the others in bfloat16.

    every: in every dtype. cases: names of the only ones wanted.
    """
    for n, case in enumerate(cases_of(op, backend)[0]):
        if cases and case.name not in cases:
            continue
        dtypes = case.dtypes if every else case.dtypes[n % len(case.dtypes) :][:1]
        for dtype in dtypes if arch == "sm_80" else case.dtypes:
            if arch == "sm_80" or dtype == torch.bfloat16:
                point = Point(op, case, dtype, arch, backend, *program)
                if not point.refused():
                    yield point
