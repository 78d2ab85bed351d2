"""The stored limits, what every kernel should reach besides, and the exceptions with their reasons."""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import triton

from ...bench.results import write_text
from ..ptxsim import cuda_build
from .occupancy import LIMITS
from .record import Kernel

_AT_MOST = ("registers", "spills", "hot_spills", "stack", "shared", "atomics", "bare")
_AT_LEAST = ("occupancy", "loads", "stores", "wide")
_MULTIPLY = ("attention", "attention_varlen", "decode_attention", "feed_forward")
_ADD = ("add_partials*", "*merge_kernel", "bias_act*", "convert*")  # their kernels that multiply no matrices
_WARPS, _MATRIX_WARPS = 16, 8  # resident: a quarter hides memory's latency with 4, a matrix unit is fed by 2

_ONCE = "a few values, saved before the loop and fetched after it"
_FASTEST = "the fastest that was measured on an H200"
_EVEN = "rows of 50257 halves start at any even address"
# (keys, what they miss, why that is right, or what it costs)
_TRITONS = [
    ("* add_partials*", "wide stores", "a thread has one sum; the 64 of a block lie side by side"),
    ("*cross_entropy * row_losses*", "wide stores", "writes a few numbers a row"),
    ("*cross_entropy * add_rows*", "wide stores", "writes two numbers"),
    ("cross_entropy 50257 *", "wide loads", _EVEN),
    ("cross_entropy 50257 *", "wide stores", _EVEN),
    ("cross_entropy * bf16 row_losses sm_100", "spills", _ONCE),
    (
        "decode_attention * merge_kernel sm_*",
        "wide stores",
        "a row of 64 to 256 numbers, of many that it reads",
    ),
    (
        "decode_attention d64 f32 split_kernel sm_*",
        "wide stores",
        "a product by FMAs leaves a thread 2 columns",
    ),
    ("attention d64*bias* _dbias_kernel sm_*", "wide stores", "rows of a bias start at any address"),
    ("attention* d64* bf16 _dkv_kernel sm_90", "spills", _FASTEST + ": 392 us, of none 616"),
    ("attention d96* bf16 _dkv_kernel sm_90", "spills", _FASTEST + " for 128 columns, as below"),
    ("attention d128* _dkv_kernel sm_90", "spills", _FASTEST + ": 2.68 ms, of none 3.33"),
    ("attention d96* bf16 _dkv_kernel sm_90", "copies in flight", _FASTEST + " for 128 columns, as below"),
    ("attention d128* _dkv_kernel sm_90", "copies in flight", _FASTEST + ": 4.65 ms with dq, ahead 4.88"),
    ("decode_attention d128 gqa int8 f32 *_120", "occupancy", "shared memory: 52 KB a block, 100 KB in all"),
]


_SMALL = "a weight or a bias: the time of a launch, however wide"
_COLUMN = "a thread adds up one column; those of a warp lie side by side"
_FEW = "one number a row, of all that row_losses has read"
_WIDE = "q, dout, and tiles of k and v, take 97 KB and more of shared memory: one block"
_OUT = "a row of 64 to 256 numbers, of the many that decode_attention has read"
_RING = "of 100 KB its rings take 68 and more: what they have under way hides memory's latency, not warps"
_TILES = "of 100 KB shared memory its tiles, cut for the 164 KB of sm_80, take 51 to 69: one block of 4 warps"
_CUDAS = [
    ("* convert_kernel*", "wide loads", _SMALL),
    ("* convert_kernel*", "wide stores", _SMALL),
    ("* add_partials_kernel*", "wide loads", _COLUMN),
    ("* add_partials_kernel*", "wide stores", _COLUMN),
    ("cross_entropy * row_losses_kernel*", "wide stores", "writes a few numbers a row"),
    ("cross_entropy * add_rows_kernel*", "wide loads", _FEW),
    ("cross_entropy * add_rows_kernel*", "wide stores", _FEW),
    ("cross_entropy 50257 *", "wide loads", _EVEN),
    ("cross_entropy 50257 *", "wide stores", _EVEN),
    ("append_kv * int8 *", "wide stores", "a thread makes 4 or 8 bytes of the 16 that it reads"),
    ("attention d64*bias* attention_dbias_kernel sm_*", "wide stores", "rows of a bias start at any address"),
    ("decode_attention * decode_merge_kernel sm_*", "wide loads", _OUT),
    ("decode_attention * decode_merge_kernel sm_*", "wide stores", _OUT),
    ("decode_attention * decode_attention_kernel sm_120", "occupancy", _RING),
    ("decode_attention d128 gqa*bf16 decode_attention_kernel sm_120", "spills", "8 bytes, in no loop"),
    ("attention* d128 * f32 attention_dq_kernel sm_*", "occupancy", _WIDE),
    ("attention d256 * attention_dq_kernel sm_*", "occupancy", _WIDE),
    ("attention* attention_*_kernel sm_120", "occupancy", _TILES),
    ("rope d64 f16 rope_kernel sm_90", "spills", "8 bytes, in no loop; 64 registers"),
]


class Compiler(NamedTuple):
    """Whose ptxas makes a backend's machine code. release: of the one that is installed here."""

    name: str
    release: Callable[[], str]
    exceptions: list[tuple[str, str, str]]


COMPILERS = {
    "triton": Compiler("Triton", lambda: triton.__version__, _TRITONS),
    "cuda": Compiler("nvcc", cuda_build.release, _CUDAS),
}


def read(file: Path, backend: str = "triton") -> dict[str, Kernel]:
    """The stored kernels by key. Raises: ValueError if another release of the compiler made them."""
    name, release, _ = COMPILERS[backend]
    stored = stored_release(file, backend)
    if stored != release():
        raise ValueError(
            f"{file} holds what the ptxas of {name} {stored} makes, this is {release()}: run make bars"
        )
    return stored_kernels(file)


def stored_release(file: Path, backend: str) -> str:
    """Of the compiler that made what is stored."""
    return json.loads(file.read_text(encoding="utf-8"))[COMPILERS[backend].name.lower()]


def stored_kernels(file: Path) -> dict[str, Kernel]:
    """The stored kernels by key, whichever release made them."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    return {key: Kernel(**kernel) for key, kernel in stored["kernels"].items()}


def write(file: Path, kernels: dict[str, Kernel], backend: str = "triton") -> None:
    """One line a kernel."""
    name, release, _ = COMPILERS[backend]
    lines = (f"{json.dumps(key)}: {json.dumps(kernel._asdict())}" for key, kernel in kernels.items())
    head = f'{{"{name.lower()}": {json.dumps(release())}, "kernels": {{\n'
    write_text(file, head + ",\n".join(lines) + "\n}}\n")


def worse(stored: dict[str, Kernel], found: dict[str, Kernel]) -> list[str]:
    """Sentences: in what kernels are worse than their stored limits, and which have none."""
    told = []
    for key, kernel in found.items():
        if key not in stored:
            told.append(f"{key}: no limits are stored: run make bars")
            continue
        limits = stored[key]
        for name in (*_AT_MOST, *_AT_LEAST):
            value, limit = getattr(kernel, name), getattr(limits, name)
            if value > limit if name in _AT_MOST else value < limit:
                told.append(f"{key}: {name} {value}, the limit is {limit}")
        for name in ("matrix", "copies"):
            for lost in set(getattr(limits, name).split()) - set(getattr(kernel, name).split()):
                told.append(f"{key}: no {lost} in its main loop any more")
    return told


def misses(key: str, kernel: Kernel) -> list[str]:
    """What a kernel should reach and does not: names of aims."""
    words = key.rpartition(" sm_")[0].split()  # op case dtype kernel, and perhaps its number
    name = words[-1 - words[-1].isdigit()]
    multiplies = words[0] in _MULTIPLY and not any(fnmatch(name, pattern) for pattern in _ADD)
    halves = multiplies and "f32" not in words
    limits = LIMITS[int(key.rpartition("_")[2])]
    warps = kernel.blocks * kernel.threads // 32
    least = _MATRIX_WARPS if multiplies else min(_WARPS, limits.warps)
    found = {
        "spills": kernel.spills or kernel.stack,
        "atomics": kernel.atomics,
        "wide loads": kernel.loads < 128,
        "wide stores": kernel.stores < 128,
        "occupancy": warps < least,
        "matrix unit": halves and not kernel.matrix,
        "copies in flight": halves and (kernel.bare or not kernel.copies),
    }
    return [aim for aim, missed in found.items() if missed]


def unexplained(kernels: dict[str, Kernel], backend: str = "triton") -> list[str]:
    """Sentences: what kernels miss without an exception, and exceptions that nothing needs."""
    told, used, exceptions = [], set(), COMPILERS[backend].exceptions
    for key, kernel in kernels.items():
        for aim in misses(key, kernel):
            excused = [e for e in exceptions if fnmatch(key, e[0]) and e[1] == aim]
            used.update(excused)
            if not excused:
                told.append(f"{key} misses {aim}: {kernel}")
    return told + [
        f"the exception {e[0]}, {e[1]} is not needed any more" for e in exceptions if e not in used
    ]
