"""CUDA C++ on the simulator: csrc/cuda's own launchers and bindings, on CPU tensors.

The library is compiled when a cuda op is first asked for. Its launches go through the stand-in CUDA runtime
(csrc/simulated) to `Runtime`, which executes the kernel's PTX on the memory that the call may touch: its
tensors' storages, and what it has allocated itself.
"""

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..._triton import simulator
from . import cuda_build
from .driver import SHARED, add_tensor, simulate
from .memory import Allocations

_LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
_POINTER, _SIZE, _THREE = ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_uint * 3)
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, _THREE, _THREE, _SIZE, ctypes.POINTER(_POINTER), _POINTER
)
_STREAM = 0x57  # a number to know the current stream by


class Launch(NamedTuple):
    """One launch as the runtime saw it."""

    kernel: str
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared: int
    stream: int | None


class Runtime:
    """A library of launchers, and what executes them. launches: those of the last call."""

    def __init__(self, library: Path, cuda: list[Path]):
        self.library, self._cuda = ctypes.CDLL(str(library)), cuda
        self.library.fastlm_simulate.argtypes = (_CALLBACK, _SIZE, _POINTER)
        self.library.fastlm_noted.argtypes = (ctypes.POINTER(_POINTER), ctypes.POINTER(_SIZE), _SIZE)
        self.library.fastlm_noted.restype = _SIZE
        self._callback = _CALLBACK(self._launched)
        self._lock = threading.RLock()
        self._error: BaseException | None = None
        self._listed: list[Launch] | None = None
        self._tensors: list[tuple[str, torch.Tensor]] = []
        self.launches: list[Launch] = []

    def call(self, function: Callable, *args, arch: str | None = None):
        """function(*args), its launches executed; a finding of theirs is raised as it is.

        Kernels may touch the storages of the tensors among args and what is allocated meanwhile.
        """
        with self._lock:
            self._arch = arch or simulator.arch
            self._error, self.launches = None, []
            self._tensors = [(f"argument {i}", a) for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
            number = int("".join(c for c in self._arch if c.isdigit()))
            self.library.fastlm_simulate(self._callback, SHARED[number], _STREAM)
            if self._listed is None:
                self.library.fastlm_note_begin()
            try:
                result = function(*args)
            except RuntimeError:
                if self._error is None:
                    raise
            finally:
                self.library.fastlm_note_end()
                self._tensors = []
            if self._error is not None:  # what stopped a launch, instead of the launcher's words for it
                raise self._error
            return result

    def listed(self, run: Callable[[], None]) -> list[Launch]:
        """What run() launches, all calls together. Nothing is executed, and no memory written or read."""
        with self._lock:
            self._listed = found = []
            try:
                run()
            finally:
                self._listed = None
            return found

    def _launched(self, kernel, grid, threads, shared, parameters, stream) -> int:
        try:
            launch = Launch(kernel.decode(), tuple(grid[0]), tuple(threads[0]), shared, stream)
            self.launches.append(launch)
            if self._listed is None:
                self._execute(launch, parameters)
            else:
                self._listed.append(launch)
        except BaseException as error:  # no exception may pass through C
            self._error = error
            return _LAUNCH_FAILURE
        return 0

    def _execute(self, launch: Launch, parameters) -> None:
        def pack(params: dict[str, tuple[int, int]]) -> bytes:
            packed = bytearray(sum(max(params.values(), default=(0, 0))))
            for i, (offset, size) in enumerate(params.values()):
                packed[offset : offset + size] = ctypes.string_at(parameters[i], size)
            return bytes(packed)

        text = cuda_build.kernels(self.source(launch.kernel), self._arch)[launch.kernel]
        simulate.execute(
            launch.kernel, text, launch.grid, launch.threads, launch.shared, self._memory(), pack
        )

    def source(self, kernel: str) -> Path:
        """The .cu that has a kernel. Raises: LookupError where none has."""
        for source in sorted(self._cuda, key=lambda f: f"_{f.stem}_cu_" not in kernel):
            if kernel in cuda_build.kernels(source, "sm_80"):  # that of the library
                return source
        raise LookupError(f"ptxsim: no PTX has a kernel {kernel}")

    def _memory(self) -> Allocations:
        memory = Allocations()
        for name, tensor in self._tensors:
            add_tensor(memory, name, tensor)
        room = self.library.fastlm_noted(None, None, 0)
        addresses, sizes = (_POINTER * room)(), (_SIZE * room)()
        self.library.fastlm_noted(addresses, sizes, room)
        for i, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
            data = (ctypes.c_uint8 * size).from_address(address)
            memory.add(f"allocation {i}", address, np.frombuffer(data, np.uint8))
        return memory


_loading = threading.Lock()  # threads that meet at the first call load one library


@functools.cache
def _namespace() -> torch.library.Library:
    return torch.library.Library("fastlm_simulated", "DEF")


@functools.cache
def runtime() -> Runtime:
    """That of csrc/cuda; compiles it first, which takes a minute, unless it has been."""
    from ..._op import RAW_OPS

    cuda, bindings = cuda_build.sources()
    made = Runtime(cuda_build.library(cuda, bindings), cuda)
    for raw in RAW_OPS:
        if raw._overloadname == "cuda":
            _namespace().define(str(raw._schema).removeprefix("fastlm::"))
    return made


def call(name: str, args: tuple):
    """The raw op fastlm::<name>.cuda on CPU tensors, in a simulated device."""
    with _loading:
        ready = runtime()
    return ready.call(getattr(torch.ops.fastlm_simulated, name).cuda, *args)
