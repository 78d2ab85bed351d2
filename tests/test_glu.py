"""glu beyond its cases: meaning, strided halves, single gradients, bad input, drawn calls."""

import itertools

import pytest
import torch
from bad_input import assert_told
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastlm._op import OPS
from fastlm.ops import glu
from fastlm.testing.cases import DTYPES, Draw
from fastlm.testing.compare import verdicts

TWINS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}


def _pair(*shape, dtype=torch.float32):
    draw = Draw(0, dtype)
    return draw.normal(*shape), draw.normal(*shape)


@pytest.mark.parametrize("activation", TWINS)
def test_reference_is_torchs_activation_times_up(activation):
    gate, up = _pair(3, 7, 41, dtype=torch.float64)
    assert torch.equal(glu(gate, up, activation, backend="reference"), TWINS[activation](gate) * up)


def test_the_default_is_swiglu():
    gate, up = _pair(7, 41)
    torch.testing.assert_close(glu(gate, up, backend="cpu"), nn.functional.silu(gate) * up)


@pytest.mark.parametrize("activation", TWINS)
def test_second_derivatives_pass_gradgradcheck(activation):
    pair = [t.requires_grad_() for t in _pair(3, 5, dtype=torch.float64)]
    f = lambda gate, up: glu(gate, up, activation, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(f, pair)


def test_halves_of_a_packed_projection_are_read_in_place():
    packed, dy = torch.randn(300, 2 * 48), torch.randn(300, 48)
    halves = [h.detach().requires_grad_() for h in packed.chunk(2, -1)]
    copies = [h.detach().contiguous().requires_grad_() for h in packed.chunk(2, -1)]
    found = []
    for pair in (halves, copies):
        y = glu(*pair, backend="cpu")
        found.append((y, *torch.autograd.grad(y, pair, dy)))
    assert halves[1].stride() == (96, 1) and all(map(torch.equal, *found))
    with torch.profiler.profile() as profile:
        glu(*halves, backend="cpu")
    assert not [
        e.name for e in profile.events() if e.name in ("aten::contiguous", "aten::clone", "aten::copy_")
    ]


def _every_normal_bfloat16(count: int) -> torch.Tensor:
    """bfloat16 numbers of random bits, subnormals made 1: the kernels flush them."""
    bits = torch.randint(-(2**15), 2**15, (count,), generator=torch.Generator().manual_seed(count))
    x = bits.to(torch.int16).view(torch.bfloat16)
    return torch.where((x.abs() < 2**-126) & (x != 0), 1.0, x)


def test_bfloat16_results_are_rounded_as_torch_rounds_them():
    gate, up = _every_normal_bfloat16(2**18 + 5), _every_normal_bfloat16(2**18 + 5).roll(1)
    exact = gate.float().relu() * up.float()
    normal = (exact.abs() >= 2**-126) | (exact == 0)
    got = glu(gate, up, "relu", backend="cpu")
    assert torch.equal(got[normal], exact.bfloat16()[normal])
    assert got[exact.isnan()].isnan().all() and exact.isnan().any()


@pytest.mark.parametrize("activation", TWINS)
def test_every_bfloat16_nan_stays_nan(activation):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    nan = every[every.isnan()]
    pair = [nan.clone().requires_grad_(), torch.ones_like(nan).requires_grad_()]
    y = glu(*pair, activation, backend="cpu")
    (dup,) = torch.autograd.grad(y.sum(), pair[1])
    assert y.isnan().all() and dup.isnan().all()


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_alone_is_the_same_gradient(which):
    pair = _pair(70, 41)
    both = [t.clone().requires_grad_() for t in pair]
    expected = torch.autograd.grad(glu(*both, backend="cpu").square().sum(), both)
    one = [t.clone().requires_grad_(i == which) for i, t in enumerate(pair)]
    (got,) = torch.autograd.grad(glu(*one, backend="cpu").square().sum(), one[which])
    assert torch.equal(got, expected[which])


def test_bits_do_not_depend_on_the_number_of_threads():
    pair = [t.requires_grad_() for t in _pair(300, 1500)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = glu(*pair, backend="cpu")
            results.append((y, *torch.autograd.grad(y.square().sum(), pair)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)), ids=str)
def test_the_backward_kernel_passes_opcheck(needs):
    gate, up = _pair(5, 41)
    torch.library.opcheck(OPS["glu"].backward["cpu"], (gate.square(), gate, up, "gelu", list(needs)))


X = torch.zeros(3, 8)
ONE_OF = "activation must be one of 'gelu', 'gelu_tanh', 'relu', 'silu', got"
BAD = [
    ({"gate": 1.0}, TypeError, "gate must be a tensor, got float"),
    ({"gate": X.long()}, TypeError, "gate must be float32, float16, bfloat16 or float64, got torch.int64"),
    ({"gate": X.to_sparse()}, TypeError, "gate must be a dense tensor, got a torch.sparse_coo one"),
    ({"up": None}, TypeError, "up must be a tensor, got NoneType"),
    (
        {"up": X[:2]},
        ValueError,
        "up must be like gate, torch.float32 of shape (3, 8) on cpu, got torch.float32",
    ),
    (
        {"up": X.half()},
        ValueError,
        "up must be like gate, torch.float32 of shape (3, 8) on cpu, got torch.float16",
    ),
    ({"up": X.to("meta")}, ValueError, "up must be like gate, torch.float32 of shape (3, 8) on cpu, got"),
    ({"activation": "sigmoid"}, ValueError, ONE_OF),
    ({"activation": None}, ValueError, ONE_OF),
    (
        {"backend": "gpu"},
        ValueError,
        "backend must be one of cuda, triton, cpu, reference or None, got 'gpu'",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input_is_told_before_any_kernel_runs(change, error, words):
    assert_told(glu, {"gate": X, "up": X} | change, error, words)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=2),
    cols=st.sampled_from((41, 64, 1025)),
    packed=st.booleans(),
    scale=st.sampled_from((0.01, 1.0, 30.0)),
    activation=st.sampled_from(tuple(TWINS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_drawn_calls_are_as_right_as_the_reference(shape, cols, packed, scale, activation, dtype, seed):
    d = Draw(seed, dtype)
    both = d.normal(*shape, 2 * cols + 1, scale=scale)
    gate, up = both[..., :cols], both[..., -cols:]
    inputs = {"gate": gate if packed else gate.contiguous(), "up": up, "activation": activation}
    found = verdicts(glu, [inputs], ("gate", "up"), "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))
