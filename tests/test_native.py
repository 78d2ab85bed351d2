"""What the CPU kernels are made of, for each instruction set: maths, conversions, Philox, threads."""

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm import _load
from fastlm._philox import philox

ROOT = Path(__file__).parents[1]
SETS = ("default", "avx2", "avx512")
AVAILABLE = SETS[: SETS.index(_load.ISA) + 1]  # a processor that has one has those before it
TINY, HUGE = 2.0**-126, float(np.finfo(np.float32).max)

MATHS = {
    "exp": np.exp,
    "exp_nonpositive": lambda x: np.exp(-np.abs(x)),
    "tanh": np.tanh,
    "erf": lambda x: torch.erf(torch.from_numpy(x)).numpy(),
}

# Counter, key, numbers: kat_vectors of the Random123 distribution, https://github.com/DEShawResearch/random123.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture(scope="module", params=AVAILABLE)
def probe(request, tmp_path_factory):
    """The functions of csrc/cpu/math.h and philox.h, compiled as the kernels of one instruction set are."""
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "csrc/toolchain.py")
    toolchain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toolchain)
    flags = f"{toolchain.KERNEL} {toolchain.ISA_FLAGS[request.param]} -shared".split()
    target = tmp_path_factory.mktemp("probe") / f"{request.param}.so"
    return ctypes.CDLL(str(toolchain.run([*flags, ROOT / "tests/native/math_probe.cpp"], target)))


def _apply(function, values: np.ndarray, result: type) -> np.ndarray:
    out = np.empty(values.shape, result)
    function(
        values.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(values.size),
        out.ctypes.data_as(ctypes.c_void_p),
    )
    return out


def _every_exponent(count: int) -> np.ndarray:
    """float32 numbers of random bits: every exponent and sign, subnormals, infinities and NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint64)
    return bits.astype(np.uint32).view(np.float32)


def _neighbours(values) -> np.ndarray:
    """Each value and the 1024 float32 numbers on each side of it."""
    bits = np.asarray(values, np.float32).view(np.int32)[:, None] + np.arange(-1024, 1025, dtype=np.int32)
    return bits.astype(np.int32).view(np.float32).ravel()


def _samples() -> np.ndarray:
    """Finite numbers of every exponent, where the functions bend, and around the joints of their pieces."""
    spread = np.random.default_rng(1).uniform(-100, 100, 2**20).astype(np.float32)
    middle = np.random.default_rng(2).uniform(-5, 5, 2**20).astype(np.float32)
    joints = _neighbours([0.625, 0.927734375, 4.0, 9.0, 87.33654, 88.0, 88.72283, 0.34657359])
    every = _every_exponent(2**20)
    return np.concatenate([every[np.isfinite(every)], spread, middle, joints, -joints])


def _ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The error in units of the last place of the exact result, a normal float32."""
    return np.abs(got.astype(np.float64) - exact) / np.exp2(np.floor(np.log2(np.abs(exact))) - 23)


@pytest.mark.parametrize("name", MATHS)
def test_maths_is_within_2_ulp(probe, name):
    x = _samples()
    with np.errstate(over="ignore", under="ignore"):
        exact = MATHS[name](x.astype(np.float64))
    got = _apply(getattr(probe, f"probe_{name}"), x, np.float32)
    normal = (np.abs(exact) >= TINY) & (np.abs(exact) <= HUGE)
    errors = _ulps(got[normal], exact[normal])
    worst = errors.argmax()
    assert errors[worst] <= 2.0, f"{name}({x[normal][worst]!r}) is {errors[worst]:.2f} ulp away"
    assert np.isposinf(got[exact > HUGE]).all()
    assert np.abs(got[np.abs(exact) < TINY]).max() <= TINY  # below the normal numbers a result may be 0


@pytest.mark.parametrize("name", MATHS)
def test_maths_of_nan_and_infinity(probe, name):
    x = np.array([np.nan, -np.nan, np.inf, -np.inf] * 8, np.float32)
    got = _apply(getattr(probe, f"probe_{name}"), x, np.float32)
    np.testing.assert_array_equal(got, MATHS[name](x.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_every_half_precision_number_widens_as_torch_widens_it(probe, name, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits).view(dtype).float().numpy()
    got = _apply(getattr(probe, f"widen_{name}"), bits, np.float32)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(got[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.isnan(got[~number]).all()


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_float32_narrows_to_half_precision_as_torch_narrows_it(probe, name, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).double()
    every = every[every.isfinite()].sort().values
    ties = (
        ((every[1:] + every[:-1]) / 2).float().numpy()
    )  # half way between neighbours: the even one is right
    x = np.concatenate(
        [_every_exponent(2**21), ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)]
    )
    expected = torch.from_numpy(x).to(dtype)
    got = _apply(getattr(probe, f"narrow_{name}"), x, np.uint16)
    number = ~expected.isnan().numpy()
    np.testing.assert_array_equal(got[number], expected.view(torch.uint16).numpy()[number])
    assert torch.from_numpy(got).view(dtype).isnan().numpy()[~number].all()


def _native_philox(probe, key: int, counter: tuple) -> list[int]:
    out = (ctypes.c_uint32 * 64)()
    probe.probe_philox(ctypes.c_uint64(key), *map(ctypes.c_uint32, counter), out)
    return list(out)


def _python_philox(key: int, counter: tuple) -> list[int]:
    signed = key - 2**64 if key >= 2**63 else key
    return [int(word) for word in philox(torch.tensor(signed), tuple(map(torch.tensor, counter)))]


@pytest.mark.parametrize(("counter", "key", "numbers"), PHILOX_VECTORS)
def test_python_philox_gives_the_published_numbers(counter, key, numbers):
    assert _python_philox(key, counter) == list(numbers)


@pytest.mark.parametrize(("counter", "key", "numbers"), PHILOX_VECTORS)
def test_native_philox_gives_the_published_numbers(probe, counter, key, numbers):
    assert _native_philox(probe, key, counter)[:4] == list(numbers)


def test_native_philox_counts_on_and_wraps_around(probe):
    first, rest, key = 2**32 - 5, (7, 2**31 + 3, 1), 0xFEDCBA9876543210
    expected = [_python_philox(key, ((first + i) % 2**32, *rest)) for i in range(16)]
    assert _native_philox(probe, key, (first, *rest)) == [word for block in expected for word in block]


THREADS = """
import os, torch
from fastlm import ops

def faults():  # page faults of each thread: field 10 of its stat, counted after the name in brackets
    stats = {t: open(f"/proc/self/task/{t}/stat").read() for t in os.listdir("/proc/self/task")}
    return {t: int(s.rsplit(")", 1)[1].split()[7]) for t, s in stats.items()}

torch.set_num_threads(2)
x = torch.ones(1, 65536).expand(1024, 65536)
ops.dropout_add(x[:64], backend="cpu")
before = faults()
y = ops.dropout_add(x, backend="cpu")
print(sum(n - before.get(t, 0) >= 16 for t, n in faults().items()))
"""


def test_a_kernel_runs_on_two_threads():
    """Each thread faults in the pages of the fresh 256 MB output that it is the first to write."""
    found = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert found.stdout.split() == ["2"]
