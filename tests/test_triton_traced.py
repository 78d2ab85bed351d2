"""The Triton backend seen by torch's tracers: torch.compile, opcheck, and fake CUDA tensors without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm import ops
from fastlm._explain import raw_arguments
from fastlm._op import OPS
from fastlm.testing import ptxsim
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import leaves, run


def first_inputs(name, dtype=torch.float32):
    return cases_of(name)[0][0].inputs(Draw(0, dtype))


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


def fake_cuda(mode, value):
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


@pytest.mark.parametrize("name", OPS)
def test_fake_cuda_tensors_choose_triton_and_run_forward(name):
    mode = FakeTensorMode()
    inputs = {n: fake_cuda(mode, v) for n, v in first_inputs(name).items()}
    if "dropout_p" in inputs:
        inputs["seed"] = fake_cuda(mode, torch.tensor([7]))
    with mode:
        assert fastlm.explain(name, **inputs).chosen == "triton"
        outputs = getattr(ops, name)(**inputs)
    for output in (outputs,) if isinstance(outputs, torch.Tensor) else outputs or ():
        assert output.is_cuda


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].backward])
def test_the_raw_backward_runs_on_fake_cuda_tensors(name):
    op, mode = OPS[name], FakeTensorMode()
    arguments, _ = raw_arguments(name, **first_inputs(name))
    named = dict(zip(op.arguments, (fake_cuda(mode, a) for a in arguments), strict=True))
    with mode, torch.no_grad():
        outputs = op.forward["triton"](*named.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        named |= dict(zip(op.outputs, outputs, strict=True))
        named |= {f"d{o}": named[o] for o in op.outputs[: op.public]}
        schema = op.backward["triton"]._schema
        named["needs"] = [True] * len(op.wanted)
        gradients = op.backward["triton"](*(named[a.name] for a in schema.arguments))
    for result, argument in zip(schema.returns, op.wanted, strict=True):
        gradient = gradients[schema.returns.index(result)] if isinstance(gradients, tuple) else gradients
        assert gradient.is_cuda
        wanted = named[op.arguments[argument]]
        assert gradient.numel() == 0 or wanted is None or gradient.shape == wanted.shape
