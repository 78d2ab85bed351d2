"""The gradient of attention's bias where a program sums several heads, one after the other."""

import re

import pytest
import torch
from fastlm_triton import _attention_backward

from fastlm import ops
from fastlm.testing import ptxsim
from fastlm.testing.cases import Draw
from fastlm.testing.cases.attention import qkv
from fastlm.testing.ptxsim import SimulationError


def _gradient(dtype, rewrite=None, arch="sm_80"):
    inputs = qkv(Draw(0, dtype), 2, 4, 41, 37, 20)
    bias = Draw(1, dtype).normal(1, 1, 41, 37).requires_grad_()
    with ptxsim.device(arch, rewrite=rewrite):
        ops.attention(**inputs, bias=bias, backend="triton").float().sum().backward()
    return bias.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_programs_of_four_heads_give_what_programs_of_one_give(dtype, monkeypatch):
    one = _gradient(dtype)
    monkeypatch.setattr(_attention_backward, "_PROGRAMS", 2)
    torch.testing.assert_close(
        _gradient(dtype), one, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=0.02
    )


@pytest.mark.parametrize("arch, dtype", [("sm_80", torch.float32), ("sm_90a", torch.bfloat16)], ids=str)
def test_between_two_heads_the_threads_wait_for_each_other(arch, dtype, monkeypatch):
    """These tiles come through registers, and one barrier keeps a step's from the last one's."""
    monkeypatch.setattr(_attention_backward, "_PROGRAMS", 2)

    def without_the_first_barrier_of_the_loop(kernel, binary):
        if kernel != "_dbias_kernel":
            return binary
        return re.sub(rb"bar\.sync\s+0;", b"", binary, count=1)

    with pytest.raises(SimulationError, match="race"):
        _gradient(dtype, without_the_first_barrier_of_the_loop, arch)
