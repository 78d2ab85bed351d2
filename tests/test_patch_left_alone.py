"""fastlm.patch: what it leaves alone and why, and that its proof finds what is wrong."""

import copy
import re

import pytest
import torch
from patched_models import DIM, Model, OwnNorm, inputs
from torch import nn
from twins import assert_alike

import fastlm
from fastlm.integrations import _adapters


def test_a_chain_with_a_hook_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
    model[1].register_forward_hook(lambda *args: None)
    (alone,) = fastlm.patch(model).left_alone
    assert alone.reason == "a part of its chain has hooks, a subclass or a parametrisation"


def reason_for(module):
    report = fastlm.patch(module)
    assert not [s for s in report.swapped if s.module is module], str(report)
    return next(a.reason for a in report.left_alone if a.name == "")


def test_a_subclass_is_left_alone():
    norm, x = OwnNorm(8), torch.randn(3, 8)
    before = norm(x)
    assert reason_for(norm) == "a subclass of LayerNorm may compute something else"
    assert type(norm) is OwnNorm and torch.equal(norm(x), before)


def test_a_forward_set_on_the_instance_is_left_alone():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.linear1.forward = lambda x: x.new_zeros(*x.shape[:-1], 16)
    assert reason_for(layer) == "its part linear1 has a forward of its own, set on the instance"
    norm = nn.LayerNorm(8)
    norm.forward = lambda x: x
    assert reason_for(norm) == "it has a forward of its own, set on the instance"


def test_what_torch_would_run_is_left_alone():
    assert "inplace" in reason_for(nn.Dropout(0.1, inplace=True))
    assert "bias_k" in reason_for(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    assert "weights" in reason_for(nn.CrossEntropyLoss(torch.ones(3)))
    assert "dim=None" in reason_for(nn.Softmax())


def test_an_encoder_with_a_layer_left_alone_is_left_alone():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    encoder.layers[1].forward = lambda src, **options: src
    assert reason_for(encoder) == "its part layers.1 has a forward of its own, set on the instance"
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    encoder.layers[1].__class__ = type("OwnLayer", (nn.TransformerEncoderLayer,), {})
    assert reason_for(encoder) == "one of its layers was left alone"


def test_devices_and_dtypes_without_kernels_are_left_alone():
    assert "meta device" in reason_for(nn.LayerNorm(8, device="meta"))
    assert "float64" in reason_for(nn.LayerNorm(8, dtype=torch.float64))


def test_without_native_kernels_all_is_left_alone(monkeypatch):
    monkeypatch.setitem(fastlm._load.MISSING, "cpu", "fastlm._cpu was not built: no g++")
    report = fastlm.patch(Model())
    assert not report.swapped
    assert {a.reason for a in report.left_alone} == {"fastlm._cpu was not built: no g++"}


def test_a_parametrised_part_is_called_as_it_is():
    layer = nn.TransformerEncoderLayer(DIM, 4, 48, 0.0, "gelu")
    nn.utils.parametrizations.weight_norm(layer.linear1)
    twin = copy.deepcopy(layer)
    assert not fastlm.patch(layer).left_alone
    kernels = assert_alike(layer, twin, [inputs()])
    assert "attention" in kernels and "feed_forward" not in kernels


def test_models_made_in_inference_mode_are_swapped():
    with torch.inference_mode():
        model = nn.TransformerEncoderLayer(DIM, 4, 48)
        assert not fastlm.patch(model).left_alone


class _WrongNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input) * 1.001


class _WrongGradient(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input.detach() + 0.5 * (input - input.detach()))


class _Failing(nn.LayerNorm):
    def forward(self, input):
        raise OSError("out of paper\nand ink")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (_WrongNorm, r"its proof failed \(rows\): output: error"),
        (_WrongGradient, r"its proof failed \(rows\): gradient of input 0: error"),
        (_Failing, "its proof did not run: OSError: out of paper$"),
    ],
)
def test_a_wrong_module_does_not_pass_its_proof(wrong, reason, monkeypatch):
    row = _adapters.Adapter(wrong, _adapters.TABLE[nn.LayerNorm].trials)
    monkeypatch.setitem(_adapters.TABLE, nn.LayerNorm, row)
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.1)), torch.randn(3, 8)
    before = model.eval()(x)
    report = fastlm.patch(model)
    assert [s.name for s in report.swapped] == ["1"]
    (alone,) = report.left_alone
    assert re.match(reason, alone.reason), alone.reason
    assert torch.equal(model(x), before)


def test_a_wrong_part_is_found_in_the_proof_of_the_whole(monkeypatch):
    monkeypatch.setattr(fastlm.nn.TransformerEncoderLayer, "_ff", lambda self, x: x)
    report = fastlm.patch(nn.TransformerEncoderLayer(8, 2, 16))
    assert [a.name for a in report.left_alone] == [""]
    assert report.left_alone[0].reason.startswith("its proof failed (causal): output: error")
