"""Calls on fake CUDA tensors, which need no GPU: what the tests of both GPU backends share."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm import ops
from fastlm._explain import raw_arguments
from fastlm._op import OPS
from fastlm.testing.cases import Draw, cases_of


def first_inputs(name, backend=None, dtype=torch.float32):
    """Those of an op's first case."""
    return cases_of(name, backend)[0][0].inputs(Draw(0, dtype))


def fake_cuda(mode, value):
    """A tensor's shape, strides and dtype on a GPU that need not be there; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return made.requires_grad_(value.requires_grad)


def public_inputs(name, mode, backend=None):
    """The public function's, with a seed that nothing has to copy to the GPU."""
    inputs = {n: fake_cuda(mode, v) for n, v in first_inputs(name, backend).items()}
    return inputs | ({"seed": fake_cuda(mode, torch.tensor([7]))} if "dropout_p" in inputs else {})


def check_forward(name, backend, chosen):
    """The public function's outputs are on the GPU; chosen: whether it is asked for by name."""
    mode = FakeTensorMode()
    inputs = public_inputs(name, mode, backend)
    with mode:
        outputs = getattr(ops, name)(**inputs, backend=None if chosen else backend)
    for output in (outputs,) if isinstance(outputs, torch.Tensor) else outputs or ():
        assert output.is_cuda


def check_raw_backward(name, backend):
    """The raw backward op's gradients are on the GPU, in their arguments' shapes.

    Not through autograd: its engine wants a GPU for a graph of CUDA tensors, fake or not.
    """
    op, mode = OPS[name], FakeTensorMode()
    arguments, _ = raw_arguments(name, **first_inputs(name, backend))
    named = dict(zip(op.arguments, (fake_cuda(mode, a) for a in arguments), strict=True))
    with mode, torch.no_grad():
        outputs = op.forward[backend](*named.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        named |= dict(zip(op.outputs, outputs, strict=True))
        named |= {f"d{o}": named[o] for o in op.outputs[: op.public]}
        schema = op.backward[backend]._schema
        named["needs"] = [True] * len(op.wanted)
        gradients = op.backward[backend](*(named[a.name] for a in schema.arguments))
    for result, argument in zip(schema.returns, op.wanted, strict=True):
        gradient = gradients[schema.returns.index(result)] if isinstance(gradients, tuple) else gradients
        assert gradient.is_cuda
        wanted = named[op.arguments[argument]]
        assert gradient.numel() == 0 or wanted is None or gradient.shape == wanted.shape
