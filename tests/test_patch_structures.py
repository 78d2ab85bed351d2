"""fastlm.patch on modules of other libraries, known by their structure and proved."""

import copy
import pickle
import sys
import types

import pytest
import torch
from llama_parts import GatedMLP, GemmaNorm, Layer, LlamaNorm
from torch import nn
from torch.nn import functional as F
from twins import assert_alike

import fastlm
from fastlm.testing.compare import KernelCalls

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("norm", "ours"), [(LlamaNorm, fastlm.nn.LlamaRMSNorm), (GemmaNorm, fastlm.nn.GemmaRMSNorm)]
)
def test_norms_of_both_kinds_are_told_apart_by_their_proof(norm, ours, dtype):
    model = norm(24, eps=1e-2).to(dtype)
    twin = copy.deepcopy(model)
    report = fastlm.patch(model)
    assert not report.left_alone and type(model) is ours, str(report)
    x = torch.randn(3, 5, 24).to(dtype)
    assert assert_alike(model, twin, [x]) == {"rms_norm", "rms_norm_backward"}
    assert model(x).dtype == twin(x).dtype == dtype
    report.undo()
    assert type(model) is norm


@pytest.mark.parametrize(("norm", "weight"), [(LlamaNorm, 1.0), (GemmaNorm, 0.0)])
def test_norms_fresh_from_their_constructor_are_swapped_too(norm, weight):
    model = norm(24)
    nn.init.constant_(model.weight, weight)
    assert not fastlm.patch(model).left_alone
    torch.testing.assert_close(model(torch.ones(2, 24)), torch.ones(2, 24))


@pytest.mark.parametrize("norm", [LlamaNorm, GemmaNorm])
def test_norms_return_the_dtype_that_they_returned_before(norm):
    model = norm(24)
    twin = copy.deepcopy(model)
    fastlm.patch(model)
    for dtype in DTYPES:
        x = torch.randn(3, 24).to(dtype)
        assert model(x).dtype == twin(x).dtype
        torch.testing.assert_close(model(x).float(), twin(x).float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(), F.silu])
def test_gated_networks_run_glu(act_fn, dtype):
    model = GatedMLP(24, 40, act_fn, bias=True).to(dtype)
    twin = copy.deepcopy(model)
    assert not fastlm.patch(model).left_alone
    assert type(model) is fastlm.nn.GatedFeedForward
    assert assert_alike(model, twin, [torch.randn(3, 5, 24).to(dtype)]) == {"glu", "glu_backward"}


def test_a_model_of_such_layers_computes_what_it_did():
    model = nn.Sequential(Layer(), Layer(norm=GemmaNorm, act_fn=nn.GELU("tanh")))
    twin = copy.deepcopy(model)
    report = fastlm.patch(model)
    assert len(report.swapped) == 4 and not report.left_alone
    assert list(model.state_dict()) == list(twin.state_dict())
    kernels = assert_alike(model, twin, [torch.randn(3, 5, 24)])
    assert kernels >= {"rms_norm", "glu", "rms_norm_backward", "glu_backward"}
    assert fastlm.patch(model).to_dict() == {"swapped": [], "left_alone": []}
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        x = torch.randn(2, 24)
        assert torch.equal(other(x), model(x)) and type(other[0].norm) is fastlm.nn.LlamaRMSNorm
    report.undo()
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]


class _Shifted(LlamaNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class _TwiceUp(GatedMLP):
    def forward(self, x):
        return super().forward(x) + self.up_proj(x).sum() * 1e-3


@pytest.mark.parametrize("module", [_Shifted(24), _TwiceUp(24, 40, nn.SiLU())], ids=["norm", "mlp"])
def test_what_only_looks_alike_fails_its_proof_and_is_left_alone(module):
    x, kind = torch.randn(3, 24), type(module)
    before = module(x)
    (alone,) = fastlm.patch(module).left_alone
    assert alone.reason.startswith("its proof failed (rows): output: error")
    assert type(module) is kind and torch.equal(module(x), before)


def test_an_activation_that_glu_does_not_know_leaves_the_network_alone():
    (alone,) = fastlm.patch(GatedMLP(24, 40, nn.Tanh())).left_alone
    assert alone.reason == "its activation has hooks, or is none that ops.glu knows"
    hooked = GatedMLP(24, 40, nn.SiLU())
    hooked.act_fn.register_forward_hook(lambda *args: None)
    assert len(fastlm.patch(hooked).left_alone) == 1


def test_hooks_of_the_projections_are_called():
    model, seen = GatedMLP(24, 40, nn.SiLU()), []
    for name in ("gate_proj", "up_proj", "down_proj"):
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.append(name))
    fastlm.patch(model)
    assert seen == [] and type(model) is fastlm.nn.GatedFeedForward
    model(torch.randn(2, 24))
    assert sorted(seen) == ["down_proj", "gate_proj", "up_proj"]


def test_other_modules_are_of_no_interest():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

    class Table(Scale):
        def __init__(self):
            super().__init__()
            self.eps, self.weight = 1e-6, nn.Parameter(torch.ones(8, 8))

    model = nn.ModuleList(
        [Scale(), Table(), nn.Linear(8, 8), nn.PReLU(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)]
    )
    assert fastlm.patch(model).to_dict() == {"swapped": [], "left_alone": []}


def test_activations_of_transformers_are_known_by_name_and_proved(monkeypatch):
    module = types.ModuleType("transformers.activations")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def of_transformers(name, function):
        members = {"forward": lambda self, x: function(x), "__module__": module.__name__}
        return type(name, (nn.Module,), members)()

    right = GatedMLP(24, 40, of_transformers("GELUTanh", lambda x: F.gelu(x, approximate="tanh")))
    wrong = GatedMLP(24, 40, of_transformers("GELUTanh", torch.tanh))
    assert not fastlm.patch(right).left_alone
    with KernelCalls() as calls:
        right(torch.randn(2, 24))
    assert calls.names == ["glu.cpu"]
    assert fastlm.patch(wrong).left_alone[0].reason.startswith("its proof failed")
