"""cross_entropy: what it means, what it does with targets that are no class, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import ops
from fastlm.testing.cases import DTYPES, Draw
from fastlm.testing.compare import KernelCalls, verdicts

X, T = torch.ones(3, 8), torch.tensor([1, 2, 3])
NAN, INFINITY = float("nan"), float("inf")
REDUCTIONS = ("none", "sum", "mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_the_reference_means_what_torch_means_in_float64(ignore_index, label_smoothing, reduction):
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 7, (50,))
    target[::5] = ignore_index
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    got = ops.cross_entropy(x, target, **options, backend="reference")
    wanted = F.cross_entropy(x, target, **options)
    dloss = torch.randn_like(wanted)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, x, dloss), torch.autograd.grad(wanted, x, dloss))


def test_z_loss_adds_the_square_of_the_log_of_the_sum_of_exps():
    x, target = torch.randn(5, 9, dtype=torch.float64) + 3, torch.randint(0, 9, (5,))
    plain, more = (ops.cross_entropy(x, target, z_loss=z, reduction="none") for z in (0.0, 0.25))
    torch.testing.assert_close(more - plain, 0.25 * x.logsumexp(-1).square())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_and_second_derivatives_of_the_reference_are_right(reduction):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    options = dict(label_smoothing=0.2, z_loss=0.3, reduction=reduction, backend="reference")

    def call(x):
        return ops.cross_entropy(x, torch.tensor([0, -100, 5, 2]), **options)

    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 5])
def test_without_a_row_that_counts_loss_and_gradient_are_zero(rows, reduction, dtype):
    x = torch.full((rows, 41), NAN, dtype=dtype, requires_grad=True)
    target = torch.full((rows,), -100)
    with KernelCalls() as calls:
        loss = ops.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.1, reduction=reduction)
        (dx,) = torch.autograd.grad(loss.sum(), x)
    assert calls.names == ["cross_entropy.cpu", "cross_entropy_backward.cpu"]
    assert (loss == 0).all() and (dx == 0).all() and dx.shape == x.shape


@pytest.mark.parametrize("bad", [-1, 8, -101, 2**62, -(2**63)])
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_a_target_out_of_range_is_an_index_error(backend, bad):
    target = torch.tensor([1, bad, -100])
    message = rf"cross_entropy: target must be in \[0, 8\) or ignore_index=-100, got {bad}"
    with KernelCalls() as calls, pytest.raises(IndexError, match=message):
        ops.cross_entropy(X, target, backend=backend)
    assert calls.names == []


@pytest.mark.parametrize("ignored", [-100, -1, 8, 255, 2])
def test_ignore_index_may_be_any_number(ignored):
    x, target = torch.randn(3, 8), torch.tensor([1, ignored, 3])
    got = ops.cross_entropy(x, target, ignore_index=ignored, reduction="none", backend="cpu")
    assert got[1] == 0
    torch.testing.assert_close(got, F.cross_entropy(x, target, ignore_index=ignored, reduction="none"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_under_compile_a_bad_target_spoils_its_own_row_only(backend):
    x, target = torch.randn(4, 8, requires_grad=True), torch.tensor([1, 8, -(2**63), 3])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x, target):
        return ops.cross_entropy(x, target, reduction="none", label_smoothing=0.1, backend=backend)

    loss = call(x, target)
    (dx,) = torch.autograd.grad(loss, x, torch.ones(4))
    good = ops.cross_entropy(x[::3], target[::3], reduction="none", label_smoothing=0.1)
    assert loss[1:3].isnan().all() and (dx[1:3] == 0).all()
    torch.testing.assert_close(loss[::3], good)
    assert (dx[::3] != 0).all()


def test_vmap_does_not_look_at_the_targets():
    loss = torch.vmap(lambda t: ops.cross_entropy(X, t))(torch.tensor([[1, 2, 9]]))
    assert loss.isnan().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_far_apart_logits_neither_overflow_nor_round_the_loss_away(backend):
    x = torch.zeros(4, 41)
    x[0, 3], x[1, 3], x[2], x[3, 3] = 1e4, 1e4, -1e4, 30.0
    x.requires_grad_()
    target = torch.tensor([3, 5, 7, 3])
    loss = ops.cross_entropy(x, target, reduction="none", backend=backend)
    (dx,) = torch.autograd.grad(loss, x, torch.ones(4))
    assert loss[0] == 0 and loss[1] == 1e4 and 0 <= loss[3] < 1e-6
    torch.testing.assert_close(loss[2], torch.tensor(41.0).log())
    assert (dx[0] == 0).all() and dx[1, 3] == 1 and dx[1, 5] == -1


LONG = 3 * 2048 + 5  # four pieces of the kernel's running maximum


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("order", ["rising", "falling", "minus infinity first", "minus infinity last"])
def test_the_running_maximum_may_change_in_any_piece(order, smoothing):
    x = torch.linspace(-200, 100, LONG).repeat(2, 1) + torch.randn(2, LONG)
    x = x.flip(-1) if order == "falling" else x
    if "infinity" in order:
        x[:, slice(0, 4100) if "first" in order else slice(2000, LONG)] = -INFINITY
        smoothing = 0.0
    target = torch.tensor([5000, 5500]) if "first" in order else torch.tensor([0, 1500])
    inputs = {"logits": x, "target": target, "label_smoothing": smoothing}
    found = verdicts(ops.cross_entropy, [inputs], ("logits",), "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))


@pytest.mark.parametrize("column", [0, 17, 2047, 2048, 5000, LONG - 1])
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_nan_and_infinity_anywhere_in_a_row_make_its_loss_nan(value, column):
    x = torch.randn(2, LONG)
    x[0, column] = value
    loss = ops.cross_entropy(x, torch.tensor([1, 1]), reduction="none", backend="cpu")
    assert loss[0].isnan() and loss[1].isfinite()


BAD = [
    ((3.0, T), {}, TypeError, "logits must be a tensor, got float"),
    ((X.long(), T), {}, TypeError, "logits must be float32, float16, .*, got torch.int64"),
    ((torch.tensor(1.0), T), {}, ValueError, "logits must have a last axis of at least one class"),
    (
        (torch.ones(3, 0), T),
        {},
        ValueError,
        r"logits must have a last axis of at least one class, .*\(3, 0\)",
    ),
    ((X, [1, 2, 3]), {}, TypeError, r"target must be an int64 tensor, got \[1, 2, 3\]"),
    ((X, T.int()), {}, TypeError, "target must be an int64 tensor, got torch.int32"),
    ((X, X), {}, TypeError, "target must be an int64 tensor, got torch.float32"),
    ((X, T[:2]), {}, ValueError, r"target must have shape \(3,\) on cpu, got .*\(2,\)"),
    ((X, T[None]), {}, ValueError, r"target must have shape \(3,\) on cpu, got .*\(1, 3\)"),
    ((X, T.to("meta")), {}, ValueError, r"target must have shape \(3,\) on cpu, got .* on meta"),
    ((X, T), {"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
    ((X, T), {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ((X, T), {"label_smoothing": -0.5}, ValueError, r"label_smoothing must be in \[0, 1\], got -0.5"),
    ((X, T), {"label_smoothing": "0"}, TypeError, "label_smoothing must be a number, got str"),
    ((X, T), {"z_loss": -1.0}, ValueError, "z_loss must not be negative, got -1.0"),
    ((X, T), {"z_loss": NAN}, ValueError, "z_loss must be finite, got nan"),
    ((X, T), {"reduction": "max"}, ValueError, "reduction must be one of 'none', 'sum', 'mean', got 'max'"),
    ((X, T), {"backend": "fast"}, ValueError, "backend must be one of .*, got 'fast'"),
]


@pytest.mark.parametrize(("args", "kwargs", "kind", "message"), BAD)
def test_bad_input_is_named_before_any_kernel_runs(args, kwargs, kind, message):
    with KernelCalls() as calls, pytest.raises(kind, match="^cross_entropy: " + message):
        ops.cross_entropy(*args, **kwargs)
    assert calls.names == []


# At least 16 classes: a shorter row's gradient is a few rounding errors, and twice another's few is luck.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    classes=st.integers(16, 200) | st.integers(2000, 4200),
    offset=st.integers(0, 3),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-3, 0.5]),
    ignored=st.sampled_from([0.0, 0.5]),
    reduction=st.sampled_from(REDUCTIONS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_it_holds_for_any_shape_stride_and_option(
    shape, classes, offset, spread, label_smoothing, z_loss, ignored, reduction, dtype, seed
):
    d = Draw(seed, dtype)
    target = d.integers(0, classes, *shape).masked_fill(d.booleans(*shape, p=ignored), -100)
    inputs = {
        "logits": d.slice_of((*shape, classes + offset), offset, classes) * spread,
        "target": target,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
    }
    found = verdicts(ops.cross_entropy, [inputs], ("logits",), "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))
