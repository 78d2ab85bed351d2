"""Where torch allows it, float32 products are TF32's: exact where its 11 bits hold the operands."""

import pytest
import torch

from fastlm import ops
from fastlm.testing import ptxsim

pytest.importorskip("fastlm_triton._matmul")
ARCHS = ["sm_80", "sm_90a", "sm_120"]


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def integers(*shape):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(len(shape))).float()


def run(op, leaves, options, arch=None):
    """The op's result and gradients; arch: on the simulator, else the reference's in float64."""
    inputs = {n: (t if arch else t.double()).requires_grad_() for n, t in leaves.items()}
    with ptxsim.device(arch or "sm_80"):
        out = op(**inputs, **options, backend="triton" if arch else "reference")
        dy = (torch.arange(out.numel()).reshape(out.shape) % 5 - 2).to(out.dtype)
        return [out, *torch.autograd.grad(out, list(inputs.values()), dy)]


def feed_forward_of_integers():
    """Every operand of a product is an integer below 2^11, and so is every sum."""
    sizes = {"x": (19, 24), "w1": (40, 24), "b1": (40,), "w2": (17, 40), "b2": (17,)}
    return {n: integers(*s) for n, s in sizes.items()}, {"activation": "relu"}


def attention_to_all_alike():
    """q = 0: every key has weight 1/32, and what is multiplied has at most ten bits."""
    k, v = integers(1, 2, 32, 16), integers(1, 2, 32, 16).sign()
    return {"q": torch.zeros(1, 2, 20, 16), "k": k, "v": v}, {"scale": 1.0}


WORKLOADS = [(ops.feed_forward, feed_forward_of_integers), (ops.attention, attention_to_all_alike)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op, made", WORKLOADS, ids=["feed_forward", "attention"])
def test_products_of_short_numbers_are_exact(tf32, op, made, arch):
    found, expected = run(op, *made(), arch), run(op, *made())
    assert all(torch.equal(f.double(), e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op, made", WORKLOADS, ids=["feed_forward", "attention"])
def test_longer_numbers_are_rounded_to_eleven_bits(tf32, op, made, arch):
    leaves, options = made()
    leaves = {n: t * (1 + 2.0**-13) for n, t in leaves.items()}
    found, right = run(op, leaves, options, arch)[0], run(op, leaves, options)[0]
    assert not torch.allclose(found.double(), right, rtol=2.0**-20, atol=0)
