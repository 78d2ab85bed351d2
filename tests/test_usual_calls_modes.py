"""No call is a usual one under a mode, a transform or the compiler, by a named backend, without builtins."""

import importlib
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from usual_calls import NAMES, assert_unusual, copied, outcome, tensors_of, usual, watched

import fastlm
from fastlm import _load, ops
from fastlm.testing.compare import KernelCalls

ROOT = Path(__file__).parents[1]


class Function(TorchFunctionMode):
    """Sees every function of torch's that is called."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "use_backend": lambda: fastlm.use_backend("reference"),
    "function_mode": Function,
    "dispatch_mode": KernelCalls,
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mode_makes_a_call_unusual(name, context):
    with CONTEXTS[context]():
        assert_unusual(name, usual()[name])


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_are_checked(name):
    with FakeTensorMode() as mode:
        arguments = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in usual()[name].items()}
        with watched(name) as taken:
            found = getattr(ops, name)(**arguments)
    assert taken == [False]
    real = getattr(ops, name)(**usual()[name])
    assert [t.shape for t in tensors_of(found)] == [t.shape for t in tensors_of(real)]


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
@pytest.mark.parametrize("name", ["layer_norm", "glu", "softmax", "rope", "feed_forward"])
def test_a_functional_transform_makes_a_call_unusual(name, transform):
    """Also of a call that the transform's own tensors do not reach."""
    plain = usual()[name]
    with watched(name) as taken:
        transform(lambda x: x + tensors_of(getattr(ops, name)(**plain))[0].sum())(torch.ones(3))
    assert taken == [False]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_makes_a_call_unusual(name):
    arguments = usual()[name]

    def function(x):
        getattr(ops, name)(**arguments)
        return x + 1

    untraceable = suppress(RuntimeError) if name == "linear_cross_entropy" else nullcontext()
    with watched(name) as taken, untraceable:  # torch.jit has no lists of bools, its `early`
        torch.jit.trace(function, torch.ones(3), check_trace=False)
    assert taken == [False]


@pytest.mark.parametrize("name", NAMES)
def test_the_compiler_traces_the_longer_way(name):
    torch._dynamo.reset()
    arguments, eager = usual()[name], usual()[name]
    eager = copied(arguments)
    wanted = getattr(ops, name)(**eager)
    with watched(name) as taken:
        got = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")(**arguments)
    assert taken == []
    for a, b in zip(tensors_of(got), tensors_of(wanted), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_backend_is_not_asked_of_the_builtin(name):
    with watched(name) as taken:
        got = outcome(name, usual()[name], backend="cpu")
    assert taken == []
    assert got[0] is not NotImplementedError


def test_a_builtin_refuses_any_number_of_arguments_but_its_own():
    for name in NAMES:
        builtin = getattr(_load.USUAL, name)
        assert builtin() is None and builtin(*[torch.ones(3, 16)] * 30) is None


def test_without_python_headers_the_libraries_are_built_and_the_reason_is_known(tmp_path, monkeypatch):
    """They then have the kernels, and no module for Python to import."""
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    toolchain = importlib.import_module("toolchain")
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert toolchain.missing_python_headers() == f"{tmp_path}/Python.h is missing"
    target = tmp_path / f"_cpu_{_load.ISA}.so"
    toolchain.cpu_libraries(Path(torch.__file__).parent, torch.__version__, {_load.ISA: target})
    assert b"PyInit__cpu_" not in target.read_bytes() and b"layer_norm_backward" in target.read_bytes()


WITHOUT = f"""
import sys
sys.modules["fastlm._cpu_{_load.ISA}"] = None
import torch, fastlm
from fastlm import _load, ops
assert _load.USUAL is None
x = torch.ones(2, 8)
print(fastlm.explain("layer_norm", x).chosen, ops.layer_norm(x).sum().item())
"""


def test_without_the_builtins_every_call_takes_the_longer_way():
    run = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    chosen = fastlm.explain("layer_norm", torch.ones(2, 8)).chosen
    assert run.stdout.split() == [chosen, "0.0"], run.stderr
