"""Rows past element 2^31 of their tensor: the Triton kernels read and write them where they are."""

import math

import pytest
import torch

from fastlm import ops
from fastlm.testing import ptxsim
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.ptxsim.profile import Profile

pytest.importorskip("fastlm_triton._config")
PAST = 1 << 31
CASES = {  # linear_cross_entropy: its x and weight go to torch.mm, its kernels see a chunk of its own
    "softmax": "odd",
    "layer_norm": "residual-dropout",
    "rms_norm": "residual-dropout",
    "dropout_add": "odd",
    "bias_act": "odd-gelu",
    "glu": "odd",
    "rope": "odd",
    "cross_entropy": "odd",
    "feed_forward": "odd",
    "attention": "mask-full",
    "attention_varlen": "odd",
    "decode_attention": "odd",
    "append_kv": "odd",
}


class _Farthest(Profile):
    """Keeps only the largest offset in a tensor, in bytes, that a launch accessed."""

    def __init__(self):
        super().__init__()
        self.offset = 0

    def block(self, *executed):
        pass

    def shared(self, *access):
        pass

    def memory(self, site, lanes, name, offset, size):
        self.offset = max(self.offset, int(offset.max()))


def far(tensor, outermost=0):
    """The same numbers in rows so far apart that the last one starts past element 2^31.

    outermost: the axis with the largest stride. Address space: only what is written gets memory.
    """
    if tensor.dim() < 2:
        return tensor
    rows = tensor.numel() // tensor.shape[-1]
    step = 2 * PAST // (rows - 1) // 64 * 64 + 64
    axes = [outermost, *(d for d in range(tensor.dim() - 1) if d != outermost)]
    strides = [0] * len(axes) + [1]
    for place, axis in enumerate(axes):
        strides[axis] = step * math.prod(tensor.shape[d] for d in axes[place + 1 :])
    made = torch.empty((rows - 1) * step + tensor.shape[-1], dtype=tensor.dtype).as_strided(
        tensor.shape, strides
    )
    made.copy_(tensor)
    return made


def tokens_first(tensor):
    """far(), of [batch, heads, seq, dim] with the rows of a head farthest apart."""
    return far(tensor, tensor.dim() - 2 if tensor.dim() == 4 else 0)


def results(op, inputs, place):
    """Outputs and gradients of the op on the simulator, tensors put by `place`; and how far it went."""
    differentiable = cases_of(op)[1]
    given = {n: place(v) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    leaves = [given[n].requires_grad_() for n in differentiable if n in given]
    touched = _Farthest()
    with ptxsim.device("sm_80", profile=touched):
        out = getattr(ops, op)(**given, backend="triton")
    found = (
        [given["k_cache"], given["v_cache"]]
        if out is None
        else list(out if isinstance(out, tuple) else [out])
    )
    if leaves:
        dy = [place((torch.arange(y.numel()).reshape(y.shape) % 5 - 2).to(y.dtype)) for y in found]
        with ptxsim.device("sm_80", profile=touched):
            found += torch.autograd.grad(found, leaves, dy)
    return found, touched.offset


PLACES = [(op, far) for op in CASES]
PLACES += [(op, tokens_first) for op in ("rope", "attention", "decode_attention", "append_kv")]


@pytest.mark.parametrize("op, place", PLACES, ids=[f"{op}-{place.__name__}" for op, place in PLACES])
def test_offsets_past_two_to_the_31_are_followed(op, place):
    case = next(c for c in cases_of(op)[0] if c.name == CASES[op])
    near, _ = results(op, case.inputs(Draw(0, torch.bfloat16)), lambda t: t)
    found, farthest = results(op, case.inputs(Draw(0, torch.bfloat16)), place)
    assert farthest >= PAST * torch.bfloat16.itemsize
    assert all(torch.equal(f, n) for f, n in zip(found, near, strict=True))
