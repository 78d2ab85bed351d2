"""launch() starts the kernel that Triton's JIT would, and leaves to it who wants to see it."""

import pytest
import torch
import triton
import triton.language as tl
from fastlm_triton._launch import launch
from triton.runtime import jit

from fastlm.testing import ptxsim


@triton.jit(do_not_specialize=["n", "step"])
def scaled(x, y, bias, n, step, width, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32) * factor + width
    value += (step.to(tl.int64) % 1000).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + i, mask=i < n, other=0.0).to(tl.float32)
    if TWICE:
        value *= 2
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < n)


def _call(dtype=torch.float32, n=40, offset=0, bias=False, step=0, width=16, factor=0.5, **options):
    whole = torch.arange(offset + n, dtype=dtype)
    x, y = whole[offset:], torch.zeros(n, dtype=dtype)
    b = torch.ones(n, dtype=dtype) if bias else None
    launch(scaled, (triton.cdiv(n, 32),), x, y, b, n, step, width, factor, BLOCK=32, **options)
    wanted = (x.double() * factor + width + step % 1000 + bool(bias)) * (2 if options.get("TWICE") else 1)
    assert torch.equal(y.double(), wanted)


def _compiled():
    return sum(isinstance(key, str) for cache in scaled.device_caches.values() for key in cache[0])


@pytest.fixture(autouse=True)
def nothing_compiled():
    scaled.device_caches.clear()
    with ptxsim.device("sm_80"):
        yield


@pytest.mark.parametrize(
    "other",
    [{"n": 33}, {"step": 7}, {"factor": 2.0}, {"n": 41, "step": 16}],
    ids=str,
)
def test_what_the_kernel_does_not_depend_on_starts_the_same(other):
    _call()
    _call(**other)
    assert _compiled() == 1


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float16},
        {"offset": 1},
        {"bias": True},
        {"width": 3},
        {"width": 1},
        {"step": 1 << 40},
        {"TWICE": True},
        {"num_warps": 2},
    ],
    ids=str,
)
def test_what_the_kernel_depends_on_starts_another(other):
    _call()
    _call(**other)
    assert _compiled() == 2
    _call(**other)
    _call()
    assert _compiled() == 2


def test_an_argument_may_be_none_after_it_was_a_tensor():
    _call(bias=True)
    _call(bias=False)
    _call(bias=True)
    assert _compiled() == 2


def test_each_device_has_its_own():
    _call()
    with ptxsim.device("sm_120"):
        _call()
    assert _compiled() == 2


@pytest.fixture
def asked(monkeypatch):
    """A list that grows by one whenever Triton looks for a compiled kernel."""
    found, look = [], jit.compute_cache_key
    monkeypatch.setattr(jit, "compute_cache_key", lambda *args: found.append(args) or look(*args))
    return found


def test_triton_is_asked_once(asked):
    _call()
    _call()
    assert len(asked) == 1


def test_who_empties_tritons_caches_empties_these():
    _call()
    scaled.device_caches.clear()
    _call()
    assert _compiled() == 1


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_with_a_hook_triton_is_asked_each_time(name, asked):
    hooks = getattr(triton.knobs.runtime, name)
    _call()
    hooks.add(print)
    try:
        _call()
    finally:
        hooks.remove(print)
    assert len(asked) == 2


def test_a_stand_in_for_triton_sees_every_launch(monkeypatch):
    _call()
    seen = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *_, **__: seen.append(self))
    launch(scaled, (1,), torch.zeros(4), torch.zeros(4), None, 4, 0, 16, 0.5, BLOCK=32)
    assert seen == [scaled]
