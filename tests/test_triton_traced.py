"""The Triton backend seen by torch's tracers: torch.compile, opcheck, and fake CUDA tensors without a GPU."""

import pytest
import torch
from fake_cuda import check_forward, check_raw_backward, first_inputs, public_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm import _load, ops
from fastlm._explain import raw_arguments
from fastlm._op import OPS
from fastlm.testing import ptxsim
from fastlm.testing.cases import cases_of
from fastlm.testing.compare import leaves, run


@pytest.mark.parametrize("name", OPS)
def test_compile_traces_the_public_function_whole(name):
    inputs, differentiable = first_inputs(name), cases_of(name)[1]
    public = getattr(ops, name)
    if "dropout_p" in inputs:
        inputs["seed"] = torch.tensor([7])

    def call(**given):
        return public(**given, backend="triton")

    call.__name__ = name
    torch._dynamo.reset()  # one function, and more ops than dynamo compiles it for
    with ptxsim.device("sm_80"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        compiled.__name__ = name
        got = run(compiled, leaves(inputs, differentiable), [])
        eager = run(call, leaves(inputs, differentiable), [])
    for key, value in eager.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("name", OPS)
def test_opcheck_accepts_the_raw_op(name):
    arguments, _ = raw_arguments(name, **first_inputs(name))
    with ptxsim.device("sm_80"), torch.no_grad():
        torch.library.opcheck(OPS[name].forward["triton"], arguments)


@pytest.mark.parametrize("name", OPS)
def test_fake_cuda_tensors_choose_triton_and_run_forward(name, monkeypatch):
    monkeypatch.setitem(_load.MISSING, "cuda", "not built")
    mode = FakeTensorMode()
    with mode:
        assert fastlm.explain(name, **public_inputs(name, mode)).chosen == "triton"
    check_forward(name, "triton", chosen=True)


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].backward])
def test_the_raw_backward_runs_on_fake_cuda_tensors(name):
    check_raw_backward(name, "triton")
