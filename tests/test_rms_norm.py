"""rms_norm beyond its cases: meaning of the reference, single gradients, bad input, drawn calls."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from bad_input import assert_told
from hypothesis import given, settings
from hypothesis import strategies as st
from native_backends import BACKENDS

from fastlm._op import OPS
from fastlm.ops import NormOutput, dropout_add, rms_norm
from fastlm.testing.cases import DTYPES, Draw, cases_of
from fastlm.testing.compare import verdicts


def _inputs(*shape, dtype=torch.float32):
    draw = Draw(0, dtype)
    return draw.normal(*shape), draw.normal(shape[-1]) + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_means_what_torch_means(backend):
    x, weight = _inputs(3, 5, 40)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3, backend=backend), F.rms_norm(x, (40,), weight, 1e-3))
    torch.testing.assert_close(rms_norm(x, eps=1e-3, backend=backend), F.rms_norm(x, (40,), None, 1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_offset_is_added_to_the_weight_in_float32(backend, dtype):
    x, weight = _inputs(4, 40, dtype=dtype)
    weight = weight / 512  # 1 + weight has more digits than half precision
    expected = rms_norm(x, weight.float() + 1, backend=backend)
    assert torch.equal(rms_norm(x, weight, weight_offset=1.0, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_h_is_what_dropout_add_gives_and_y_its_norm(backend):
    x, weight = _inputs(9, 130)
    options = {"dropout_p": 0.3, "seed": 2**40 + 7, "backend": backend}
    found = rms_norm(x, weight, residual=x.flip(0), **options)
    h = dropout_add(x, x.flip(0), **options)
    assert isinstance(found, NormOutput) and torch.equal(found.h, h)
    assert torch.equal(found.y, rms_norm(h, weight, backend=backend))


@pytest.mark.parametrize("which", [w for w in itertools.product([True, False], repeat=3) if any(w)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_some_gradients_alone_are_the_same_gradients(which, p):
    x, weight = _inputs(70, 41)
    given_tensors = x, weight, x.flip(0)

    def gradients(wanted):
        leaves = [t.clone().requires_grad_(w) for t, w in zip(given_tensors, wanted, strict=True)]
        y, h = rms_norm(*leaves[:2], residual=leaves[2], dropout_p=p, seed=3, backend="cpu")
        return torch.autograd.grad((y.square() + h).sum(), [t for t in leaves if t.requires_grad])

    expected = [g for g, w in zip(gradients((True,) * 3), which, strict=True) if w]
    assert all(map(torch.equal, gradients(which), expected))


@pytest.mark.parametrize("output", [0, 1])
def test_a_gradient_of_one_output_alone_flows(output):
    tensors = [t.requires_grad_() for t in (*_inputs(5, 41), torch.ones(5, 41))]

    def gradients(backend):
        out = rms_norm(*tensors[:2], residual=tensors[2], backend=backend)[output]
        return torch.autograd.grad(
            out.square().sum(), tensors, allow_unused=output == 1, materialize_grads=output == 1
        )

    for got, expected in zip(gradients("cpu"), gradients("reference"), strict=True):
        torch.testing.assert_close(got, expected)


def test_bits_do_not_depend_on_the_number_of_threads():
    x, weight = (t.requires_grad_() for t in _inputs(300, 1500))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = rms_norm(x, weight, dropout_p=0.1, seed=1, backend="cpu")
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_the_backward_kernel_passes_opcheck(needs):
    x, weight = _inputs(5, 41)
    for p in (0.0, 0.2):
        raw = OPS["rms_norm"].check(x, weight, 1e-6, 1.0, x.flip(0), p, 3)
        _, h, rstd = OPS["rms_norm"].forward["cpu"](*raw)
        arguments = (x.square(), None, x, h, weight, 1.0, rstd, p, raw[-1], list(needs))
        torch.library.opcheck(OPS["rms_norm"].backward["cpu"], arguments)


X, WEIGHT = torch.ones(3, 8), torch.ones(8)
BAD = [
    ({"x": 3.0}, TypeError, "x must be a tensor, got float"),
    ({"x": X.long()}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int64"),
    ({"x": X.sum()}, ValueError, "x must have a last axis of at least one element, got"),
    ({"x": torch.ones(3, 0), "weight": None}, ValueError, "x must have a last axis of at least one element"),
    (
        {"weight": torch.ones(7)},
        ValueError,
        "weight must have shape (8,) on cpu, got torch.float32 of shape (7,)",
    ),
    ({"weight": WEIGHT.half()}, TypeError, "weight must be torch.float32 as x or float32, got torch.float16"),
    (
        {"weight": WEIGHT.double()},
        TypeError,
        "weight must be torch.float32 as x or float32, got torch.float64",
    ),
    ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
    ({"eps": "small"}, TypeError, "eps must be a number, got str"),
    ({"weight_offset": float("nan")}, ValueError, "weight_offset must be finite, got nan"),
    ({"weight_offset": "1"}, TypeError, "weight_offset must be a number, got str"),
    (
        {"weight": None, "weight_offset": 1.0},
        ValueError,
        "weight_offset must be 0 without a weight, got 1.0",
    ),
    ({"residual": X[:2]}, ValueError, "residual must be like x, torch.float32 of shape (3, 8) on cpu, got"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
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
    assert_told(rms_norm, {"x": X, "weight": WEIGHT} | change, error, words)


# At least 16 columns: a shorter row's gradient is a few rounding errors, and twice another's few is luck.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple),
    cols=st.integers(16, 200),
    offset=st.integers(0, 3),
    options=st.fixed_dictionaries({"weight": st.booleans(), "residual": st.booleans()}),
    weight_offset=st.sampled_from([0.0, 1.0]),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_it_holds_for_any_shape_stride_and_option(
    shape, cols, offset, options, weight_offset, p, dtype, seed
):
    d = Draw(seed % 2**31, dtype)
    inputs = {
        "x": d.slice_of((*shape, cols + offset), offset, cols),
        "dropout_p": p,
        "seed": seed,
        "eps": 1e-3,
    }
    if options["weight"]:
        inputs |= {"weight": d.normal(cols), "weight_offset": weight_offset}
    if options["residual"]:
        inputs["residual"] = d.normal(*shape, cols)
    found = verdicts(rms_norm, [inputs], cases_of("rms_norm")[1], "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))
