"""feed_forward beyond its cases: meaning, autocast, memory, bad input, drawn shapes and options."""

import pytest
import torch
from bad_input import assert_told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastlm._op import OPS
from fastlm.ops import bias_act, feed_forward
from fastlm.testing.cases import DTYPES, Draw
from fastlm.testing.compare import verdicts

TWINS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}
NAMES = ("x", "w1", "b1", "w2", "b2")


def _inputs(rows=9, size=24, hidden=40, out=16, dtype=torch.float32):
    draw = Draw(0, dtype)
    first = draw.normal(rows, size), draw.normal(hidden, size, scale=0.2), draw.normal(hidden)
    return *first, draw.normal(out, hidden, scale=0.2), draw.normal(out)


@pytest.mark.parametrize("activation", TWINS)
def test_reference_is_torchs_own_layers(activation):
    x, w1, b1, w2, b2 = _inputs(dtype=torch.float64)
    twin = nn.Sequential(nn.Linear(24, 40), TWINS[activation], nn.Linear(40, 16)).double()
    twin.load_state_dict({"0.weight": w1, "0.bias": b1, "2.weight": w2, "2.bias": b2})
    assert torch.equal(feed_forward(x, w1, b1, w2, b2, activation, backend="reference"), twin(x))


def test_reference_drops_after_the_activation():
    x, w1, b1, w2, b2 = _inputs(dtype=torch.float64)
    got = feed_forward(x, w1, b1, w2, b2, dropout_p=0.4, seed=9, backend="reference")
    a = bias_act(x @ w1.T, b1, dropout_p=0.4, seed=9, backend="reference")
    torch.testing.assert_close(got, a @ w2.T + b2)


@pytest.mark.parametrize("activation", TWINS)
def test_reference_passes_gradcheck(activation):
    inputs = [t.requires_grad_() for t in _inputs(2, 3, 4, 2, torch.float64)]
    f = lambda *t: feed_forward(*t, activation, dropout_p=0.3, seed=3, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(backend, dtype):
    inputs = [t.requires_grad_() for t in _inputs()]
    with torch.autocast("cpu", dtype):
        got = feed_forward(*inputs, dropout_p=0.1, seed=4, backend=backend)
        assert nn.functional.linear(*inputs[:3]).dtype == got.dtype
    by_hand = feed_forward(*(t.to(dtype) for t in inputs), dropout_p=0.1, seed=4, backend=backend)
    assert torch.equal(got, by_hand)
    grads = torch.autograd.grad(got.float().square().sum(), inputs)
    expected = torch.autograd.grad(by_hand.float().square().sum(), inputs)
    assert all(map(torch.equal, grads, expected))
    assert {g.dtype for g in grads} == {torch.float32}


def test_autocast_leaves_float64_alone():
    inputs = _inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(feed_forward(*inputs), feed_forward(*inputs, backend="reference"))


def test_one_tensor_of_hidden_size_is_kept_for_backward():
    inputs = [t.requires_grad_() for t in _inputs(rows=9, hidden=40)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        feed_forward(*inputs, dropout_p=0.1, backend="cpu")
    assert kept.count((9, 40)) == 1
    assert len(kept) == len(inputs) + 2  # the inputs, the seed, x @ w1.T + b1


@pytest.mark.parametrize(
    "wanted", [("x",), ("w1",), ("b1",), ("w2",), ("b2",), ("w1", "w2"), ("x", "b1", "b2")]
)
def test_some_gradients_are_the_same_gradients(wanted):
    every = dict(zip(NAMES, (t.requires_grad_() for t in _inputs()), strict=True))
    loss = feed_forward(**every, dropout_p=0.2, seed=1, backend="cpu").square().sum()
    expected = dict(zip(NAMES, torch.autograd.grad(loss, every.values()), strict=True))
    some = {n: t.detach().requires_grad_(n in wanted) for n, t in every.items()}
    loss = feed_forward(**some, dropout_p=0.2, seed=1, backend="cpu").square().sum()
    got = torch.autograd.grad(loss, [some[n] for n in wanted])
    for name, gradient in zip(wanted, got, strict=True):
        torch.testing.assert_close(gradient, expected[name])


def test_backward_twice_gives_the_same_gradients():
    inputs = [t.requires_grad_() for t in _inputs()]
    loss = feed_forward(*inputs, dropout_p=0.2, seed=1, backend="cpu").square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, inputs)))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(compiler):
    inputs = [t.requires_grad_() for t in _inputs()]
    f = lambda *t: feed_forward(*t, "relu", dropout_p=0.2, seed=5).sin()  # noqa: E731
    expected = torch.autograd.grad(f(*inputs).sum(), inputs)
    compiled = torch.compile(f, fullgraph=True, backend=compiler)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs).sum(), inputs), expected)


def test_compiles_whole_under_autocast():
    inputs = [t.requires_grad_() for t in _inputs()]
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(*inputs), feed_forward(*inputs))


@pytest.mark.parametrize("biased", [True, False])
def test_kernels_pass_opcheck(biased):
    x, w1, b1, w2, b2 = _inputs()
    tensors = (x.reshape(3, 3, 24), w1, b1 if biased else None, w2, b2 if biased else None)
    rest = ("gelu", 0.2, torch.tensor([3]))
    op = OPS["feed_forward"]
    torch.library.opcheck(op.forward["cpu"], (*tensors, *rest))
    y, z = op.forward["cpu"](*tensors, *rest)
    for needs in ([True] * 5, [False, True, False, True, False], [True, False, True, False, True]):
        needs = [n and t is not None for n, t in zip(needs, tensors, strict=True)]
        torch.library.opcheck(op.backward["cpu"], (y, *tensors, z, *rest, needs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 16), (3, 3, 16), (1, 0, 16), (16,)])
def test_raw_kernels_neither_cast_nor_record_and_take_any_strides(shape, dtype):
    first = Draw(0, dtype).normal(*shape[:-1], 24)
    tensors = [t.requires_grad_() for t in (first, *_inputs(dtype=dtype)[1:])]
    rest, op = ("silu", 0.2, torch.tensor([3])), OPS["feed_forward"]
    y, z = op.forward["cpu"](*tensors, *rest)
    dy = torch.stack([torch.ones_like(y), y.detach()], -1)[..., 1]
    wanted = op.backward["cpu"](y.detach(), *tensors, z, *rest, [True] * 5)
    with torch.autocast("cpu", torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        again = op.forward["cpu"](*tensors, *rest)
        got = op.backward["cpu"](dy, *tensors, z, *rest, [True] * 5)
    assert all(map(torch.equal, (y, z), again))
    assert [(g.dtype, g.shape) for g in got] == [(dtype, t.shape) for t in tensors]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


BAD = [
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ({"x": torch.zeros(())}, ValueError, "x must have a last axis, got torch.float32 of shape ()"),
    (
        {"x": torch.zeros(9, 25)},
        ValueError,
        "w1 must have shape [hidden, 25] on cpu, got torch.float32 of shape",
    ),
    ({"w1": torch.zeros(40)}, ValueError, "w1 must have shape [hidden, 24] on cpu, got"),
    ({"w1": torch.zeros(40, 24).half()}, TypeError, "w1 must be torch.float32 as x, got torch.float16"),
    ({"w1": "w1"}, TypeError, "w1 must be a tensor, got str"),
    ({"w2": torch.zeros(16, 41)}, ValueError, "w2 must have shape [out, 40] on cpu, got"),
    ({"w2": torch.zeros(16, 40, device="meta")}, ValueError, "w2 must have shape [out, 40] on cpu, got"),
    ({"b1": torch.zeros(41)}, ValueError, "b1 must have shape [40] on cpu, got torch.float32 of shape (41,)"),
    ({"b2": torch.zeros(16, 1)}, ValueError, "b2 must have shape [16] on cpu, got"),
    ({"b2": torch.zeros(16).double()}, TypeError, "b2 must be torch.float32 as x, got torch.float64"),
    (
        {"activation": "swish"},
        ValueError,
        "activation must be one of 'gelu', 'gelu_tanh', 'relu', 'silu', got",
    ),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
    (
        {"dropout_p": 0.1, "seed": 0.5},
        ValueError,
        "seed must be None, a 64-bit int or an int64 tensor, got 0.5",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input_is_told_before_any_kernel_runs(change, error, words):
    assert_told(feed_forward, dict(zip(NAMES, _inputs(), strict=True)) | change, error, words)


@st.composite
def calls(draw):
    """Arguments of feed_forward: x of any leading shape; sizes enough for a fair maximum of an error."""
    made = Draw(draw(st.integers(0, 9)), draw(st.sampled_from(DTYPES)))
    lead = draw(st.lists(st.integers(0, 9), max_size=2))
    size, hidden, out = (draw(st.sampled_from((24, 41, 130))) for _ in range(3))
    x = made.normal(*lead, size)
    if draw(st.booleans()):
        x = made.slice_of((*lead, size + 3), 1, size)
    if draw(st.booleans()) and len(lead) == 2:
        x = x.transpose(0, 1)
    return {
        "x": x,
        "w1": made.normal(hidden, size, scale=size**-0.5),
        "b1": made.normal(hidden) if draw(st.booleans()) else None,
        "w2": made.normal(out, hidden, scale=hidden**-0.5),
        "b2": made.normal(out) if draw(st.booleans()) else None,
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
    found = verdicts(feed_forward, [inputs], NAMES, "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))
