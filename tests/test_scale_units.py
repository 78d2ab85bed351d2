"""Gradients of linear_cross_entropy times what only a GPU knows: in place; a factor of 1 costs nothing."""

import pytest
import torch

from fastlm import ops
from fastlm.testing import ptxsim
from fastlm.testing.cases import DTYPES
from fastlm.testing.ptxsim import cuda

pytest.importorskip("triton")
from fastlm_triton import scale_units as triton_scale  # noqa: E402

BACKENDS = ("cuda", "triton")


@pytest.fixture(autouse=True)
def simulated():
    with ptxsim.device("sm_80"):
        yield


def scaled(units, factor, backend):
    made = units.clone()
    getattr(torch.ops.fastlm.scale_units, backend)(made, torch.tensor(factor))
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 8, 2047, 4096, 5000])
def test_each_is_multiplied_in_float32_and_rounded_once(size, dtype, backend):
    units = torch.randn(size).to(dtype)
    expected = (units.float() * torch.tensor(1 / 3)).to(dtype)
    assert torch.equal(scaled(units, 1 / 3, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_all_programs_take_at_once(monkeypatch, backend):
    monkeypatch.setattr(triton_scale, "PROGRAMS", 2)
    blocks = 2048 * 256  # threads of csrc/cuda/scale_units.cu; odd sizes go by the element
    for size in (blocks + 257, 4 * blocks + 516) if backend == "cuda" else (5 * triton_scale.SIZE + 1,):
        units = torch.randn(size)
        assert torch.equal(scaled(units, -2.0, backend), -2 * units)


def test_a_hook_may_give_back_gradients_that_lie_otherwise():
    torch.manual_seed(0)
    x, w = (torch.randn(n, 16).requires_grad_() for n in (9, 40))

    def gradients(dloss):
        loss = ops.linear_cross_entropy(x, w, torch.arange(9), backend="triton")
        return torch.autograd.grad(loss, (x, w), torch.tensor(dloss))

    expected = [3 * g for g in gradients(1.0)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, _apart):
        found = gradients(3.0)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def _apart(t):
    """The same numbers, every second one of a row in memory."""
    return torch.stack([t, t], -1)[..., 0] if t.dim() == 2 else t


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_a_factor_of_1_no_bit_changes(backend):
    bits = torch.randint(-(2**15), 2**15, (4096,), dtype=torch.int16)  # NaN of all sorts among them
    assert torch.equal(scaled(bits.view(torch.bfloat16), 1.0, backend).view(torch.int16), bits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
def test_other_factors_are_multiplied_with_as_they_are(factor, backend):
    units = torch.tensor([0.0, -1.0, 2.0])
    torch.testing.assert_close(scaled(units, factor, backend), units * factor, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dloss", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_ends_gives_the_gradients_of_one_that_is_kept(dtype, dloss, backend, monkeypatch):
    torch.manual_seed(0)
    x, w = (torch.randn(n, 16).to(dtype).requires_grad_() for n in (9, 40))
    loss = ops.linear_cross_entropy(x, w, torch.arange(9), backend=backend)
    dloss, launched = torch.tensor(dloss, dtype=dtype), []
    monkeypatch.setattr(triton_scale, "launch", noted(triton_scale.launch, launched))
    first = torch.autograd.grad(loss, (x, w), dloss, retain_graph=True)
    assert not launched
    last = torch.autograd.grad(loss, (x, w), dloss)
    assert all(map(torch.equal, first, last))
    if backend == "cuda":
        launched = [n.kernel for n in cuda.runtime().launches if "scale_units" in n.kernel]
    assert launched  # of the last call, that for the weight, if not of both


def noted(launch, names):
    def run(kernel, *args, **kwargs):
        names.append(kernel.__name__)
        return launch(kernel, *args, **kwargs)

    return run
