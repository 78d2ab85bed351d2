"""The CUDA kernels beyond their ops' cases: widths of accesses, far offsets, bits that must not differ."""

import pytest
import torch

from fastlm import ops
from fastlm.testing import ptxsim
from fastlm.testing.ptxsim import cuda

# Of each op on rows x: a call that reads them as they are.
CALLS = {
    "softmax": lambda x: ops.softmax(x, backend="cuda"),
    "layer_norm": lambda x: ops.layer_norm(x, backend="cuda"),
    "rms_norm": lambda x: ops.rms_norm(x, backend="cuda"),
    "dropout_add": lambda x: ops.dropout_add(x, x, backend="cuda"),
    "bias_act": lambda x: ops.bias_act(x, backend="cuda"),
    "glu": lambda x: ops.glu(x, x, backend="cuda"),
    "rope": lambda x: ops.rope(x[None, None], *_tables(*x.shape), backend="cuda"),
    "rope-interleaved": lambda x: ops.rope(
        x[None, None], *_tables(*x.shape), interleaved=True, backend="cuda"
    ),
    "cross_entropy": lambda x: ops.cross_entropy(x, torch.arange(len(x)), backend="cuda"),
}


def _tables(seq, dim):
    angles = torch.arange(float(seq * dim)).view(seq, dim)
    return angles.cos(), angles.sin()


@pytest.fixture(autouse=True)
def simulated():
    with ptxsim.device("sm_80"):
        yield


def test_one_seed_gives_the_mask_of_the_cpu():
    x, residual = torch.randn(9, 130), torch.zeros(9, 130)
    options = {"residual": residual, "dropout_p": 0.3, "seed": 5}
    for name in ("layer_norm", "rms_norm"):
        h = {b: getattr(ops, name)(x, backend=b, **options)[1] for b in ("cuda", "cpu")}
        assert torch.equal(h["cuda"], h["cpu"])
    y = {b: ops.dropout_add(x, backend=b, **options) for b in ("cuda", "cpu")}
    assert torch.equal(y["cuda"], y["cpu"]) and torch.equal(y["cuda"], h["cuda"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_rows_that_are_not_aligned_are_read_by_the_element(name, dtype):
    width = 16 // dtype.itemsize
    aligned = torch.randn(5, 2 * width).to(dtype)
    odd = torch.empty(10 * width + 1, dtype=dtype)[1:].view(5, 2 * width).copy_(aligned)
    assert odd.data_ptr() % 16 != 0
    kernels, found = [], []
    for x in (aligned, odd):
        x.requires_grad_()
        y = CALLS[name](x)
        kernels.append([launch.kernel for launch in cuda.runtime().launches])
        found.append((y, *torch.autograd.grad(y.sum(), x)))
    assert any(f"Li{width}E" in k for k in kernels[0]) and any("Li1E" in k for k in kernels[1])
    for a, b in zip(*found, strict=True):
        assert (a.double() - b.double()).abs().max() <= torch.finfo(dtype).eps * max(1, a.abs().max())


def test_gradients_past_the_diagonal_have_no_influence():
    y = ops.softmax(torch.randn(24, 24), causal=True, backend="cuda")
    later = torch.ones(24, 24, dtype=torch.bool).triu(1)
    dy = torch.randn(24, 24)
    plain = torch.ops.fastlm.softmax_backward.cuda(dy, y, 1.0, True)
    nan = torch.ops.fastlm.softmax_backward.cuda(dy.masked_fill(later, float("nan")), y, 1.0, True)
    assert torch.equal(plain, nan)


@pytest.mark.parametrize("norm", [ops.layer_norm, ops.rms_norm])
def test_a_norm_of_which_only_h_is_used_passes_its_gradient_on(norm):
    x, residual = (torch.randn(5, 24, requires_grad=True) for _ in range(2))
    weight = torch.ones(24, requires_grad=True)
    _, h = norm(x, weight, residual=residual, dropout_p=0.5, seed=3, backend="cuda")
    dx, dresidual, dweight = torch.autograd.grad(h.sum(), (x, residual, weight), allow_unused=True)
    assert torch.equal(dresidual, torch.ones_like(x))
    assert torch.equal(dx, 2.0 * (h != residual))
    assert dweight is None or (dweight == 0).all()


@pytest.mark.parametrize("cols", [40, 600, 9000])
@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm, ops.bias_act])
def test_weight_gradients_have_the_same_bits_in_every_run(op, cols):
    x, weight = torch.randn(20, cols), torch.randn(cols, requires_grad=True)  # two blocks of rows
    runs = []
    for _ in range(2):
        y = op(x, weight, backend="cuda")
        runs.append(torch.autograd.grad(y.square().sum(), weight)[0])
    assert torch.equal(*runs)


@pytest.fixture
def far_rows():
    """[3, 40] in float16, 2^30 elements from row to row: memory that nobody touches costs nothing."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows = torch.empty((1 << 31) + 40, dtype=torch.float16).as_strided((3, 40), (1 << 30, 1))
    torch.utils.deterministic.fill_uninitialized_memory = fills
    return rows.copy_(torch.randn(3, 40))


@pytest.mark.parametrize("name", CALLS)
def test_rows_past_two_to_the_31_elements_are_found(name, far_rows):
    found = []
    for x in (far_rows, far_rows.contiguous()):
        x.requires_grad_()
        y = CALLS[name](x)
        dy = x.detach().view(y.shape) if y.numel() == x.numel() else torch.ones_like(y)
        found.append((y, *torch.autograd.grad(y, x, dy)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_that_is_no_class_gives_nan_and_nothing_outside_is_read(smoothing):
    logits, target = torch.randn(5, 40, requires_grad=True), torch.tensor([0, 40, 39, -1, 2**40])
    options = (-100, smoothing, 0.0, "none")
    loss, maximum, exp_sum, count = torch.ops.fastlm.cross_entropy.cuda(logits.detach(), target, *options)
    saved = (maximum, exp_sum, count, *options)
    dx = torch.ops.fastlm.cross_entropy_backward.cuda(torch.ones(5), logits.detach(), target, *saved)
    good = [0, 2]
    assert loss.isnan().tolist() == [False, True, False, True, True]
    assert (dx[[1, 3, 4]] == 0).all()
    expected = torch.nn.functional.cross_entropy(
        logits[good], target[good], reduction="none", label_smoothing=smoothing
    )
    torch.testing.assert_close(loss[good], expected)
    torch.testing.assert_close(dx[good], torch.autograd.grad(expected.sum(), logits)[0][good])


def _norm_inputs(name, dtype):
    given = {"x": torch.randn(4, 48), "weight": torch.randn(48)}
    given |= {"bias": torch.randn(48)} if name == "layer_norm" else {}
    return {n: t.to(dtype).requires_grad_() for n, t in given.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_weights_in_half_precision_take_no_launch_of_their_own(name, dtype):
    given = _norm_inputs(name, dtype)
    y = getattr(ops, name)(**given, backend="cuda")
    assert len(cuda.runtime().launches) == 1
    torch.autograd.grad(y.float().sum(), list(given.values()))
    assert len(cuda.runtime().launches) == 2  # and the sums over rows


def test_parameters_of_two_types_are_read_right():
    x, (cos, sin) = torch.randn(1, 2, 5, 16).bfloat16(), _tables(5, 16)
    mixed = torch.ops.fastlm.rope.cuda(x, cos, sin.bfloat16(), False)
    assert torch.equal(mixed, torch.ops.fastlm.rope.cuda(x, cos, sin.bfloat16().float(), False))
