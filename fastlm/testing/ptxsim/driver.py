"""Triton on the simulator: a driver whose device is this CPU.

`kernel[grid](cpu_tensors)` goes through Triton's own JIT, specialisation and compiler down to PTX; ptxas is
left out, and a launch runs the PTX on the tensors' memory.
"""

import ctypes
import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from ..._triton import simulated
from .compile import Compiled, compile_program
from .machine import Machine, launch
from .memory import Allocations
from .order import Order, Ordered
from .parse import parse

# Bytes of shared memory that a block may ask for, and multiprocessors (A100, H100, B200, RTX 5090).
# Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
_PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}
ARCHS = tuple(SHARED)
_FORMATS = {"fp16": "e", "fp32": "f", "fp64": "d"}


class Driver:
    """What triton.runtime.driver.active is while kernels run here."""

    def __init__(self, arch: int, run, key: str):
        self.arch, self.run, self.utils = arch, run, self
        self.launcher_cls = functools.partial(_Launcher, self)
        self._target = GPUTarget("cuda", arch, 32)
        self._device = f"{key} {arch}"  # Triton keeps what it has compiled by device

    def get_current_device(self) -> str:
        """A name: nothing but a key."""
        return self._device

    def set_current_device(self, device) -> None:
        """There is one."""

    def get_current_stream(self, device) -> int:
        """Launches run at once."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return self._target

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    def get_device_properties(self, device) -> dict:
        """What Triton and the kernels ask for."""
        return {
            "max_shared_mem": SHARED[self.arch],
            "multiprocessor_count": _PROCESSORS[self.arch],
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device) -> tuple:
        """(module, function, registers, spills, threads of a block at most).

        A module would be unloaded by whatever driver is active then; without one Triton may load again.
        """
        return None, SimpleNamespace(name=name, binary=binary, shared=shared), 0, 0, 1024

    def unload_module(self, module) -> None:
        """Nothing is loaded."""

    @staticmethod
    def map_python_to_cpp_type(kind: str) -> str:
        """As Triton's own driver does, which must be here for its launchers."""
        return kind


class _Launcher:
    """Triton's launcher of one kernel: packs the arguments as the kernel's parameters, and runs it."""

    def __init__(self, driver: Driver, source, metadata):
        self._driver, self._warps = driver, metadata.num_warps
        self._kinds = list(source.signature.items())

    def __call__(self, x, y, z, stream, function, packed, launched, enter, leave, *arguments):
        given = [g for (n, k), a in zip(self._kinds, arguments, strict=True) for g in _flat(n, k, a)]
        if x * y * z > 0:
            self._driver.run(function, (x, y, z), (32 * self._warps, 1, 1), given)


def _flat(name: str, kind, argument):
    """(name, kind, value) of each parameter that an argument is passed in: several for a tuple."""
    if isinstance(kind, tuple):
        for inner, value in zip(kind, argument, strict=True):
            yield from _flat(name, inner, value)
    elif kind != "constexpr":
        yield name, kind, argument


@functools.lru_cache(maxsize=512)
def _compiled(binary: bytes) -> Compiled:
    return compile_program(parse(binary.decode()))


def run(
    text: str, grid: tuple, threads: tuple, arguments: list, shared=0, name=None, profile=None, order=None
) -> None:
    """Runs a kernel given as PTX.

    grid, threads: three sizes each. arguments: CPU tensors, and numbers as bytes of their parameter's size.
    shared: bytes of a block beside what the text declares. name: of the kernel, if there are several.
    profile: a Profile that counts every access, order: an Order that is told what orders them; or None.
    Raises: UnknownInstruction, SimulationError.
    """
    compiled, memory = compile_program(parse(text, name)), Allocations()
    params = compiled.program.params.values()
    packed = bytearray(sum(max(params, default=(0, 0))))
    for (offset, size), argument in zip(params, arguments, strict=True):
        if isinstance(argument, torch.Tensor):
            add_tensor(memory, f"argument {offset}", argument)
            argument = struct.pack("<Q", argument.data_ptr())
        packed[offset : offset + size] = argument
    if profile is not None:
        profile.start(compiled.program.name, grid, threads)
    size = compiled.program.static_shared + shared
    launch(compiled, grid, threads, size, bytes(packed), memory, profile, _machine(order))


class Simulate:
    """Runs launches. profile: sees every access; rewrite: (kernel, PTX) -> the PTX to run; order: sees what
    orders accesses; or None."""

    def __init__(self):
        self.profile = None
        self.rewrite = None
        self.order: Order | None = None

    def __call__(self, function, grid, threads, given) -> None:
        """One launch of Triton's."""
        memory = Allocations()
        for name, kind, argument in given:
            if kind.startswith("*"):
                add_tensor(memory, name, argument)

        def pack(params: dict[str, tuple[int, int]]) -> bytes:
            packed = bytearray(sum(max(params.values(), default=(0, 0))))
            pairs = zip(params.values(), given, strict=False)  # two pointers to scratch follow
            for (offset, size), (_, kind, argument) in pairs:
                packed[offset : offset + size] = _pack(kind, argument, size)
            return bytes(packed)

        self.execute(function.name, function.binary, grid, threads, function.shared, memory, pack)

    def execute(self, name: str, text: bytes, grid, threads, dynamic: int, memory: Allocations, pack) -> None:
        """Runs a kernel's PTX.

        dynamic: bytes of shared memory beside what the text declares. pack: from the program's parameters to
        their values, packed.
        """
        compiled = _compiled(text if self.rewrite is None else self.rewrite(name, text))
        if self.profile is not None:
            self.profile.start(name, grid, threads)
        size, arguments = compiled.program.static_shared + dynamic, pack(compiled.program.params)
        launch(compiled, grid, threads, size, arguments, memory, self.profile, _machine(self.order))


def _machine(order: Order | None):
    return Machine if order is None else functools.partial(Ordered, order)


def add_tensor(memory: Allocations, name: str, tensor: torch.Tensor) -> None:
    """A CPU tensor's whole storage: its views share it."""
    storage = tensor.untyped_storage()
    if storage.nbytes():
        address = storage.data_ptr()
        data = (ctypes.c_uint8 * storage.nbytes()).from_address(address)
        memory.add(name, address, np.frombuffer(data, np.uint8))


def _pack(kind: str, value, size: int) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr())
    if kind in _FORMATS:
        return struct.pack(f"<{_FORMATS[kind]}", value)
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


def to_ptx(*stages_of_backend):
    """Triton's hook on its stages: ptxas is not run, the PTX itself is the binary."""
    if not stages_of_backend:
        return "fastlm ptxsim", "fastlm ptxsim"
    stages_of_backend[1]["cubin"] = lambda source, metadata: source.encode()
    return None


simulate = Simulate()


@functools.cache
def _driver(arch: int) -> Driver:
    return Driver(arch, simulate, "ptxsim")


@contextmanager
def device(arch: str = "sm_80", profile=None, rewrite=None, order: Order | None = None) -> Iterator[None]:
    """Inside it, backend "triton" takes CPU tensors: its kernels' PTX is executed by the simulator.

    arch: "sm_80", "sm_90a", "sm_100a" or "sm_120". profile: a Profile that counts every access, or None.
    rewrite: (kernel's name, PTX) -> the PTX to run instead, or None. order: an Order that is told of what
    orders the accesses, or None. Fresh tensors are filled with NaN (the
    largest number, if of integers): what a kernel forgets to write, or reads too early, is seen.
    Raises: ValueError for another arch.
    """
    number = int("".join(c for c in arch if c.isdigit()) or 0)
    if number not in ARCHS:
        known = ", ".join(f"sm_{a}" for a in ARCHS)
        raise ValueError(f"ptxsim.device: arch must be one of {known}, got {arch!r}")
    with driven_by(_driver(number), to_ptx), simulated(arch), _filled():
        before = simulate.profile, simulate.rewrite, simulate.order
        simulate.profile, simulate.rewrite, simulate.order = profile, rewrite, order
        try:
            yield
        finally:
            simulate.profile, simulate.rewrite, simulate.order = before


@contextmanager
def driven_by(driver: Driver, hook=None) -> Iterator[None]:
    """Triton compiles for and launches on `driver`; hook: on its stages."""
    runtime = triton.runtime.driver
    before = runtime._active, triton.knobs.runtime.add_stages_inspection_hook
    runtime.set_active(driver)
    triton.knobs.runtime.add_stages_inspection_hook = hook
    try:
        yield
    finally:
        runtime._active, triton.knobs.runtime.add_stages_inspection_hook = before


@contextmanager
def _filled() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    _deterministic(True, warn_only=True)
    try:
        yield
    finally:
        _deterministic(before, warn_only=warned)


# What torch.use_deterministic_algorithms calls, without its import of torch._inductor: that takes 5 s.
_deterministic = torch._C._set_deterministic_algorithms
