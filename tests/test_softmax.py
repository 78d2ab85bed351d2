"""softmax: what it means, what it never reads, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import ops
from fastlm.testing.cases import DTYPES, Draw
from fastlm.testing.compare import KernelCalls, judge, leaves, verdicts

X = torch.ones(3, 8)
NAN = float("nan")


def excluded(mask, causal, shape):
    """True where the position is not attended to, of `shape`."""
    out = torch.zeros(shape, dtype=torch.bool) if mask is None else ~mask.expand(shape)
    return out | torch.ones(shape[-2:], dtype=torch.bool).triu(1) if causal else out


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_sum_to_one_and_to_zero_where_nothing_is_attended(dtype):
    d = Draw(0, dtype)
    x, mask = d.normal(50, 300), d.booleans(50, 300)
    mask[2] = False
    y, low = (ops.softmax(x, mask=mask, backend=b) for b in ("cpu", "reference"))
    sums, low_sums = (t.double().sum(-1).to(dtype) for t in (y, low))
    verdict = judge("sums", sums, low_sums, mask.any(-1).double())
    assert verdict.ratio <= 1, verdict
    assert (y[2] == 0).all() and (y[~mask] == 0).all() and mask.any(-1).sum() == 49


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.125, -2.0])
def test_the_reference_means_what_torch_means_in_float64(scale, masked, causal):
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, 9, 9) < 0.7 if masked else None
    if masked:
        mask[..., 0] = True  # torch has no answer for a row without anything to attend to
    out = excluded(mask, causal, x.shape)
    wanted = torch.softmax((x * scale).masked_fill(out, float("-inf")), -1)
    got = ops.softmax(x, scale=scale, mask=mask, causal=causal, backend="reference")
    dy = torch.randn_like(x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, x, dy), torch.autograd.grad(wanted, x, dy))


@pytest.mark.parametrize("causal", [False, True])
def test_first_and_second_derivatives_of_the_reference_are_right(causal):
    x = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5, 5) < 0.6
    mask[0, 3] = False

    def call(x):
        return ops.softmax(x, scale=0.7, mask=mask, causal=causal, backend="reference")

    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_anywhere_in_a_row_makes_that_row_nan_and_no_other(dtype):
    x = torch.zeros(83, 83, dtype=dtype).fill_diagonal_(NAN)
    padded = torch.cat([x, torch.zeros(1, 83, dtype=dtype)])
    y = ops.softmax(padded, backend="cpu")
    assert y[:83].isnan().all() and y[83].isfinite().all()


def test_nan_beside_nothing_but_minus_infinity_is_not_lost():
    x = torch.full((40, 40), float("-inf")).fill_diagonal_(NAN)
    assert ops.softmax(x, backend="cpu").isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_rows_neither_read_nor_leak_what_comes_later(dtype):
    x = Draw(0, dtype).normal(2, 33, 33)
    later = torch.ones(33, 33, dtype=torch.bool).triu(1)
    poisoned = x.masked_fill(later, NAN).requires_grad_()
    clean = x.masked_fill(later, 5.0).requires_grad_()
    dy = torch.randn(2, 33, 33).to(dtype)
    y, wanted = (ops.softmax(t, causal=True, backend="cpu") for t in (poisoned, clean))
    (dx,) = torch.autograd.grad(y, poisoned, dy.masked_fill(later, NAN))
    (dwanted,) = torch.autograd.grad(wanted, clean, dy)
    assert torch.equal(y, wanted) and torch.equal(dx, dwanted)
    assert (y[:, later] == 0).all() and (dx[:, later] == 0).all()


def test_rows_that_attend_to_nothing_have_gradient_zero():
    x = torch.randn(3, 40, requires_grad=True)
    mask = torch.tensor([True, False, True])[:, None]
    y = ops.softmax(x, mask=mask, backend="cpu")
    (dx,) = torch.autograd.grad(y, x, torch.randn(3, 40))
    assert (dx[1] == 0).all() and dx.isfinite().all() and (dx[0] != 0).any()


MASKS = {
    "of keys": lambda: torch.rand(2, 1, 1, 41) < 0.5,
    "of rows": lambda: torch.rand(9, 1) < 0.5,
    "of batches": lambda: torch.rand(2, 1, 1, 1) < 0.5,
    "every other head": lambda: (torch.rand(2, 6, 1, 41) < 0.5)[:, ::2],
    "a slice": lambda: (torch.rand(4, 3, 12, 90) < 0.5)[::2, :, 3:, 5:46],
    "every other column": lambda: (torch.rand(2, 3, 9, 82) < 0.5)[..., ::2],
    "transposed": lambda: (torch.rand(2, 3, 41, 9) < 0.5).transpose(2, 3),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_read_in_place_whatever_it_broadcasts_along(kind):
    x, mask = torch.randn(2, 3, 9, 41), MASKS[kind]()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.softmax(x, mask=mask, backend="cpu")
    copies = {e.key for e in profile.key_averages()} & {"aten::copy_", "aten::clone", "aten::contiguous"}
    found = verdicts(ops.softmax, [{"x": x, "mask": mask}], ("x",), "cpu")
    assert not copies and all(v.ratio <= 1 for v in found), "\n".join(map(str, found))


def test_a_mask_of_more_dimensions_than_the_kernel_walks_is_right_too():
    x = torch.randn(*[2] * 18, 3)
    mask = torch.rand(*[2, 1] * 9, 3) < 0.5
    wanted = ops.softmax(x, mask=mask.expand(x.shape).contiguous(), backend="cpu")
    assert torch.equal(ops.softmax(x, mask=mask, backend="cpu"), wanted)


BAD = [
    ((3.0,), {}, TypeError, "softmax: x must be a tensor, got float"),
    ((X.long(),), {}, TypeError, "softmax: x must be float32, float16, .*, got torch.int64"),
    ((X,), {"scale": "1"}, TypeError, "softmax: scale must be a number, got str"),
    ((X,), {"scale": NAN}, ValueError, "softmax: scale must be finite, got nan"),
    ((X,), {"causal": 1}, TypeError, "softmax: causal must be True or False, got 1"),
    ((X,), {"causal": True}, ValueError, r"softmax: x must be square .* got .*\(3, 8\)"),
    ((torch.ones(8),), {"causal": True}, ValueError, r"softmax: x must be square .* got .*\(8,\)"),
    ((X,), {"mask": X}, TypeError, "softmax: mask must be a boolean tensor .*, got torch.float32"),
    ((X,), {"mask": True}, TypeError, "softmax: mask must be a boolean tensor .*, got True"),
    ((X,), {"mask": X[:, :7] > 0}, ValueError, r"softmax: mask must broadcast to \(3, 8\) .*\(3, 7\)"),
    ((X,), {"mask": X[None] > 0}, ValueError, r"softmax: mask must broadcast to \(3, 8\) .*\(1, 3, 8\)"),
    ((X,), {"mask": (X > 0).to("meta")}, ValueError, r"softmax: mask must broadcast .* on cpu, got .* meta"),
    ((X,), {"backend": "fast"}, ValueError, "softmax: backend must be one of .*, got 'fast'"),
]


@pytest.mark.parametrize(("args", "kwargs", "kind", "message"), BAD)
def test_bad_input_is_named_before_any_kernel_runs(args, kwargs, kind, message):
    with KernelCalls() as calls, pytest.raises(kind, match=message):
        ops.softmax(*args, **kwargs)
    assert calls.names == []


# At least 16 columns: a shorter row's gradient is a few rounding errors, and twice another's few is luck.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    rows=st.integers(1, 9),
    cols=st.integers(16, 200),
    offset=st.integers(0, 3),
    scale=st.sampled_from([1.0, 0.125, -3.0]),
    mask_dims=st.none() | st.lists(st.booleans(), min_size=2, max_size=5),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_it_holds_for_any_shape_stride_and_option(
    shape, rows, cols, offset, scale, mask_dims, causal, dtype, seed
):
    d = Draw(seed, dtype)
    shape = (*shape, cols if causal else rows, cols)
    x = d.slice_of((*shape[:-1], cols + offset), offset, cols)
    inputs = {"x": x, "scale": scale, "causal": causal}
    if mask_dims is not None:
        sizes = [s if keep else 1 for s, keep in zip(shape[::-1], mask_dims, strict=False)]
        inputs["mask"] = d.booleans(*sizes[::-1], p=0.7)
    found = verdicts(ops.softmax, [inputs], ("x",), "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))


def test_a_gradient_that_is_not_wanted_is_not_computed():
    inputs = leaves({"x": torch.randn(4, 40)}, ())
    with KernelCalls() as calls:
        assert not ops.softmax(**inputs).requires_grad
    assert calls.names == ["softmax.cpu"]
