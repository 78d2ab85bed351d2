"""bias_act beyond its cases: meaning of the reference, bad input, drawn shapes and options."""

import pytest
import torch
from bad_input import assert_told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_backends import BACKENDS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm._op import OPS
from fastlm._philox import row_scales
from fastlm.ops import bias_act
from fastlm.testing.cases import DTYPES, Draw
from fastlm.testing.compare import verdicts

TWINS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}


def _inputs(*shape, dtype=torch.float32):
    draw = Draw(0, dtype)
    return draw.normal(*shape), draw.normal(shape[-1])


@pytest.mark.parametrize("activation", TWINS)
def test_reference_is_torchs_own_activation(activation):
    x, bias = _inputs(3, 7, 41, dtype=torch.float64)
    got = bias_act(x, bias, activation, backend="reference")
    assert torch.equal(got, TWINS[activation](x + bias))


@pytest.mark.parametrize("activation", TWINS)
def test_reference_passes_gradcheck(activation):
    x, bias = (t.requires_grad_() for t in _inputs(3, 5, dtype=torch.float64))
    f = lambda x, bias: bias_act(x, bias, activation, dropout_p=0.3, seed=3, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, bias))
    assert torch.autograd.gradgradcheck(f, (x, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", TWINS)
def test_dropout_comes_after_the_activation(backend, activation):
    x, bias = _inputs(9, 130)
    seed = 2**40 + 7
    scales = row_scales(torch.tensor([seed]), x.shape, 0.3, torch.float32)
    got = bias_act(x, bias, activation, dropout_p=0.3, seed=seed, backend=backend)
    assert torch.equal(got, bias_act(x, bias, activation, backend=backend) * scales)


def test_bits_do_not_depend_on_the_number_of_threads():
    x, bias = (t.requires_grad_() for t in _inputs(300, 1500))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = bias_act(x, bias, dropout_p=0.1, seed=1, backend="cpu")
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, bias))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_a_gradient_alone_is_the_same_gradient(which):
    x, bias = _inputs(70, 41)
    both = [t.clone().requires_grad_() for t in (x, bias)]
    expected = torch.autograd.grad(bias_act(*both, backend="cpu").square().sum(), both)
    one = [t.clone().requires_grad_(w) for t, w in zip((x, bias), which, strict=True)]
    wanted = [t for t in one if t.requires_grad]
    (got,) = torch.autograd.grad(bias_act(*one, backend="cpu").square().sum(), wanted)
    assert torch.equal(got, expected[which.index(True)])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(compiler):
    x, bias = (t.requires_grad_() for t in _inputs(9, 130))
    f = lambda x, bias: bias_act(x * 2, bias, "silu", dropout_p=0.2, seed=5).sin()  # noqa: E731
    expected = torch.autograd.grad(f(x, bias).sum(), (x, bias))
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend=compiler)(x, bias).sum(), (x, bias))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("biased", [True, False])
def test_kernels_pass_opcheck(biased):
    x, bias = _inputs(5, 41)
    arguments = (x, bias if biased else None, "gelu", 0.2, torch.tensor([3]))
    torch.library.opcheck(OPS["bias_act"].forward["cpu"], arguments)
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(OPS["bias_act"].backward["cpu"], (torch.ones_like(x), *arguments, needs))


X = torch.zeros(3, 8)
BAD = [
    ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
    ({"x": X.long()}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int64"),
    ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor, got a torch.sparse_coo one"),
    ({"x": X.sum()}, ValueError, "x must have a last axis for bias, got torch.float32 of shape ()"),
    (
        {"bias": torch.zeros(7)},
        ValueError,
        "bias must have shape (8,) on cpu, got torch.float32 of shape (7,)",
    ),
    ({"bias": torch.zeros(1, 8)}, ValueError, "bias must have shape (8,) on cpu, got"),
    ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias must have shape (8,) on cpu, got"),
    (
        {"bias": torch.zeros(8).half()},
        TypeError,
        "bias must be torch.float32 as x or float32, got torch.float16",
    ),
    (
        {"activation": "tanh"},
        ValueError,
        "activation must be one of 'gelu', 'gelu_tanh', 'relu', 'silu', got",
    ),
    ({"activation": None}, ValueError, "activation must be one of 'gelu', 'gelu_tanh', 'relu', 'silu', got"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float, got str"),
    (
        {"dropout_p": 0.1, "seed": 2**63},
        ValueError,
        "seed must be None, a 64-bit int or an int64 tensor, got",
    ),
    (
        {"backend": "gpu"},
        ValueError,
        "backend must be one of cuda, triton, cpu, reference or None, got 'gpu'",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input_is_told_before_any_kernel_runs(change, error, words):
    assert_told(bias_act, {"x": X, "bias": torch.zeros(8)} | change, error, words)


def test_other_devices_run_on_the_reference():
    with FakeTensorMode():
        x = torch.zeros(3, 8, device="xpu")
        assert fastlm.explain("bias_act", x).chosen == "reference"
        assert bias_act(x).device.type == "xpu"


@st.composite
def calls(draw):
    """Arguments of bias_act: any leading shape, sliced or transposed; enough columns for a fair maximum."""
    made = Draw(draw(st.integers(0, 9)), draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 9), max_size=2)) + [draw(st.sampled_from((41, 64, 1025)))]
    x = made.normal(*shape, scale=draw(st.sampled_from((0.01, 1.0, 30.0))))
    if draw(st.booleans()):
        x = made.slice_of((*shape[:-1], shape[-1] + 3), 1, shape[-1])
    if draw(st.booleans()) and len(shape) == 3:
        x = x.transpose(0, 1)
    bias = draw(st.sampled_from((None, made.dtype, torch.float32)))
    return {
        "x": x,
        "bias": None if bias is None else made.normal(shape[-1], dtype=bias),
        "activation": draw(st.sampled_from(tuple(TWINS))),
        "dropout_p": draw(st.sampled_from((0.0, 0.1, 0.75))),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
    }


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(inputs=calls())
def test_drawn_calls_are_as_right_as_the_reference(inputs):
    found = verdicts(bias_act, [inputs], ("x", "bias"), "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))
