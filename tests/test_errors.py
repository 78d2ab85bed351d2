"""Bad input is one clear sentence before any kernel runs: op, argument, what was wanted, what came."""

import pytest
import torch

from fastlm import ops
from fastlm._op import OPS
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import KernelCalls

X = torch.ones(3, 8)
INTEGERS = torch.ones(3, 8, dtype=torch.int64)

BAD = [
    ("layer_norm", (3.0,), {}, TypeError, "layer_norm: x must be a tensor, got float"),
    ("layer_norm", (INTEGERS,), {}, TypeError, "layer_norm: x must be float32, float16, .*, got torch.int64"),
    ("layer_norm", (torch.tensor(1.0),), {}, ValueError, "x must have a last axis of at least one element"),
    ("layer_norm", (torch.ones(3, 0),), {}, ValueError, "x must have a last axis of at least one element"),
    ("layer_norm", (X, torch.ones(7)), {}, ValueError, r"weight must have shape \(8,\) on cpu, got .*\(7,\)"),
    ("layer_norm", (X, None, torch.ones(3, 8)), {}, ValueError, r"bias must have shape \(8,\)"),
    ("layer_norm", (X, torch.ones(8).half()), {}, TypeError, "weight must be torch.float32 as x or float32"),
    ("layer_norm", (X, None, None, -1.0), {}, ValueError, "eps must not be negative, got -1.0"),
    ("layer_norm", (X, None, None, float("nan")), {}, ValueError, "eps must be finite, got nan"),
    ("layer_norm", (X, None, None, "small"), {}, TypeError, "eps must be a number, got str"),
    ("layer_norm", (X,), {"residual": torch.ones(2, 8)}, ValueError, r"residual must be like x, .*\(2, 8\)"),
    ("layer_norm", (X,), {"residual": X.half()}, ValueError, "residual must be like x, .*torch.float16"),
    ("layer_norm", (X,), {"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ("layer_norm", (X,), {"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ("layer_norm", (X,), {"dropout_p": "0"}, TypeError, "dropout_p must be a float, got str"),
    ("layer_norm", (X,), {"dropout_p": 0.5, "seed": 2**63}, ValueError, "seed must be None, a 64-bit int or"),
    (
        "layer_norm",
        (X,),
        {"dropout_p": 0.5, "seed": X},
        ValueError,
        "seed must be int64 of one element on cpu",
    ),
    ("dropout_add", (INTEGERS,), {}, TypeError, "dropout_add: x must be float32, .*, got torch.int64"),
    ("dropout_add", (X, torch.ones(3, 9)), {}, ValueError, "residual must be like x"),
    ("dropout_add", (X,), {"dropout_p": 2}, ValueError, r"dropout_p must be in \[0, 1\), got 2"),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "kind", "message"), BAD)
def test_bad_input_is_named_before_any_kernel_runs(op, args, kwargs, kind, message):
    with KernelCalls() as calls, pytest.raises(kind, match=message):
        getattr(ops, op)(*args, **kwargs)
    assert calls.names == []


UNUSUAL = {
    "complex": torch.ones(3, 8, dtype=torch.complex64),
    "sparse": torch.ones(3, 8).to_sparse(),
    "nested": torch.nested.nested_tensor([torch.ones(3, 8)], layout=torch.jagged),
    "quantised": torch.quantize_per_tensor(torch.ones(3, 8), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("name", OPS)
def test_unusual_tensors_are_a_type_error(name, kind):
    inputs = cases_of(name)[0][0].inputs(Draw(0, torch.float32))
    first = next(iter(inputs))
    with pytest.raises(TypeError, match=f"{name}: {first} must be "):
        getattr(ops, name)(**inputs | {first: UNUSUAL[kind]})
