"""Which kernels of csrc/cuda a call launches, as nvcc's ptxas makes them for a GPU. Nothing is run."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

from ..._triton import simulated
from ..ptxsim import cuda_build
from ..ptxsim.cuda import runtime
from .compiled import Compiled, numbered
from .occupancy import RESERVED
from .sass import static_shared

_LENGTH = re.compile(r"\d+")


def launched(arch: int, run: Callable[[], None]) -> list[tuple[str, Compiled]]:
    """(name, what was compiled) of each kernel that `run` launches; a second one of a name is "name 2"."""
    with simulated(f"sm_{arch}"):
        launches = runtime().listed(run)
    seen = dict.fromkeys((launch.kernel, launch.shared, launch.threads[0]) for launch in launches)
    return numbered((name_of(kernel), _compiled(arch, kernel, *sizes)) for kernel, *sizes in seen)


def _compiled(arch: int, kernel: str, shared: int, threads: int) -> Compiled:
    cubin = _cubin(arch, runtime().source(kernel))
    declared = static_shared(cubin, kernel)
    if arch >= 90 and declared:  # the driver's part is counted there
        declared -= RESERVED
    return Compiled(kernel, cubin, shared + declared, threads)


@functools.cache
def _cubin(arch: int, source: Path) -> bytes:
    return cuda_build.cubin(source, f"sm_{arch}").read_bytes()


def name_of(mangled: str) -> str:
    """A kernel's own name: "glu_kernel" of fastlm::(anonymous namespace)::glu_kernel<float, 4>.

    Source: Itanium C++ ABI, section 5.1, https://itanium-cxx-abi.github.io/cxx-abi/abi.html#mangling.
    """
    at, name = mangled.index("N") + 1, mangled
    while length := _LENGTH.match(mangled, at):
        at = length.end() + int(length.group())
        name = mangled[length.end() : at]
    return name
