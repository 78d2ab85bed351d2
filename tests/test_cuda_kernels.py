"""The CUDA kernels beyond their ops' cases: widths of accesses, far offsets, bits that must not differ."""

import pytest
import torch

from fastlm import ops
from fastlm.testing import ptxsim
from fastlm.testing.ptxsim import cuda


@pytest.fixture(autouse=True)
def simulated():
    with ptxsim.device("sm_80"):
        yield


def test_one_seed_gives_the_mask_of_the_cpu():
    x, residual = torch.randn(9, 130), torch.zeros(9, 130)
    options = {"residual": residual, "dropout_p": 0.3, "seed": 5}
    h = {b: ops.layer_norm(x, backend=b, **options)[1] for b in ("cuda", "cpu")}
    assert torch.equal(h["cuda"], h["cpu"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["softmax", "layer_norm"])
def test_rows_that_are_not_aligned_are_read_by_the_element(name, dtype):
    width = 16 // dtype.itemsize
    aligned = torch.randn(5, width).to(dtype)
    odd = torch.empty(5 * width + 1, dtype=dtype)[1:].view(5, width).copy_(aligned)
    assert odd.data_ptr() % 16 != 0
    kernels, found = [], []
    for x in (aligned, odd):
        found.append(getattr(ops, name)(x, backend="cuda"))
        kernels.append(cuda.runtime().launches[-1].kernel)
    assert f"Li{width}E" in kernels[0] and "Li1E" in kernels[1]
    assert (found[0].double() - found[1].double()).abs().max() <= torch.finfo(dtype).eps


def test_gradients_past_the_diagonal_have_no_influence():
    y = ops.softmax(torch.randn(24, 24), causal=True, backend="cuda")
    later = torch.ones(24, 24, dtype=torch.bool).triu(1)
    dy = torch.randn(24, 24)
    plain = torch.ops.fastlm.softmax_backward.cuda(dy, y, 1.0, True)
    nan = torch.ops.fastlm.softmax_backward.cuda(dy.masked_fill(later, float("nan")), y, 1.0, True)
    assert torch.equal(plain, nan)


def test_a_norm_of_which_only_h_is_used_passes_its_gradient_on():
    x, residual = (torch.randn(5, 24, requires_grad=True) for _ in range(2))
    weight = torch.ones(24, requires_grad=True)
    _, h = ops.layer_norm(x, weight, residual=residual, dropout_p=0.5, seed=3, backend="cuda")
    dx, dresidual, dweight = torch.autograd.grad(h.sum(), (x, residual, weight), allow_unused=True)
    assert torch.equal(dresidual, torch.ones_like(x))
    assert torch.equal(dx, 2.0 * (h != residual))
    assert dweight is None or (dweight == 0).all()


@pytest.mark.parametrize("cols", [40, 600, 5000])
def test_weight_gradients_have_the_same_bits_in_every_run(cols):
    x, weight = torch.randn(70, cols), torch.randn(cols, requires_grad=True)
    runs = []
    for _ in range(2):
        y = ops.layer_norm(x, weight, backend="cuda")
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


@pytest.mark.parametrize("name", ["softmax", "layer_norm"])
def test_rows_past_two_to_the_31_elements_are_found(name, far_rows):
    y = getattr(ops, name)(far_rows, backend="cuda")
    assert torch.equal(y, getattr(ops, name)(far_rows.contiguous(), backend="cuda"))
