"""fastlm.patch: each of its promises is a test."""

import copy
import pickle

import pytest
import torch
from patched_models import DIM, SEQ, Model, OwnNorm, inputs
from torch import nn
from twins import assert_alike

import fastlm
from fastlm.integrations import _adapters
from fastlm.testing.compare import KernelCalls


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_patched_model_computes_what_it_did_on_kernels(norm_first):
    model = Model(norm_first).eval()
    twin = copy.deepcopy(model)
    report = fastlm.patch(model)
    assert not report.left_alone
    kernels = assert_alike(model, twin, [inputs()])
    assert kernels >= {
        "attention",
        "layer_norm",
        "feed_forward",
        "dropout_add" if norm_first else "layer_norm",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_swapped(dtype):
    model = Model().eval().to(dtype)
    twin = copy.deepcopy(model)
    assert not fastlm.patch(model).left_alone
    with torch.no_grad():
        assert model(inputs().to(dtype)).dtype == twin(inputs().to(dtype)).dtype == dtype


def test_every_class_of_the_table_is_swapped_to_an_importable_class():
    made = {
        nn.LayerNorm: (4,),
        nn.RMSNorm: (4,),
        nn.Dropout: (0.1,),
        nn.Softmax: (-1,),
        nn.Sequential: (nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)),
        nn.MultiheadAttention: (8, 2),
        nn.TransformerEncoderLayer: (8, 2, 16),
        nn.TransformerEncoder: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        nn.TransformerDecoderLayer: (8, 2, 16),
        nn.CrossEntropyLoss: (),
    }
    assert made.keys() == _adapters.TABLE.keys()
    for kind, args in made.items():
        module = kind(*args)
        report = fastlm.patch(module)
        assert ("", kind) in [(s.name, s.old) for s in report.swapped], str(report)
        assert type(module) is getattr(fastlm.nn, kind.__name__)
        assert isinstance(module, kind)


def test_undo_gives_back_the_old_outputs_bitwise():
    model, x = Model().eval(), inputs()
    before = model(x)
    kinds = [type(m) for m in model.modules()]
    report = fastlm.patch(model)
    assert not torch.equal(model(x), before)
    report.undo()
    assert torch.equal(model(x), before)
    assert [type(m) for m in model.modules()] == kinds
    report.undo()
    assert torch.equal(model(x), before)


def test_patched_undoes_itself_even_after_an_error():
    model = Model()
    with fastlm.patched(model) as report:
        assert type(model.encoder) is fastlm.nn.TransformerEncoder and report.swapped
    assert type(model.encoder) is nn.TransformerEncoder
    with pytest.raises(KeyError), fastlm.patched(model):
        raise KeyError
    assert type(model.encoder) is nn.TransformerEncoder


def test_patching_twice_changes_nothing():
    model = Model()
    fastlm.patch(model)
    kinds = [type(m) for m in model.modules()]
    again = fastlm.patch(model)
    assert again.to_dict() == {"swapped": [], "left_alone": []}
    again.undo()
    assert [type(m) for m in model.modules()] == kinds


def test_pickle_and_deepcopy_work():
    model, x = Model().eval(), inputs()
    fastlm.patch(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(x), model(x))


def test_parameters_keys_names_and_modes_are_kept():
    model = Model()
    model.encoder.layers[0].eval()
    model.head.weight.requires_grad_(False)
    model.mlp[0].bias.requires_grad_(False)
    model.encoder.norm.weight.grad = torch.ones(DIM)
    parameters = {n: (p, p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()}
    modules = {n: (m, m.training) for n, m in model.named_modules()}
    keys = list(model.state_dict())
    fastlm.patch(model)
    assert list(model.state_dict()) == keys
    assert {n: (m, m.training) for n, m in model.named_modules()} == modules
    for name, p in model.named_parameters():
        before, requires_grad, grad, value = parameters[name]
        assert p is before and p.requires_grad == requires_grad and p.grad is grad and torch.equal(p, value)


def test_random_numbers_and_buffers_are_not_touched():
    model = Model()
    model.encoder.layers[0].register_buffer("calls", torch.zeros(3))
    model.decoder.activation = lambda x: x + 0 * torch.rand_like(x)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    fastlm.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.encoder.layers[0].calls.eq(0).all()


def test_shared_modules_and_parameters_stay_shared():
    norm = nn.LayerNorm(DIM)
    model = nn.ModuleList([norm, nn.Sequential(norm, nn.Linear(DIM, DIM)), nn.LayerNorm(DIM)])
    model[2].weight = norm.weight
    report = fastlm.patch(model)
    assert model[0] is model[1][0] is norm
    assert model[2].weight is norm.weight
    assert len(report.swapped) == 2
    own = OwnNorm(DIM)
    assert [a.name for a in fastlm.patch(nn.ModuleList([own, nn.ModuleList([own])])).left_alone] == ["0"]


def test_hooks_are_kept_and_never_called_by_the_proof():
    model, seen = Model().eval(), []
    for name in (
        "encoder",
        "encoder.layers.1",
        "encoder.layers.0.norm2",
        "mlp.1",
        "encoder.layers.1.self_attn",
    ):
        part = model.get_submodule(name)
        part.register_forward_hook(lambda *args, name=name: seen.append(name))
        part.register_forward_pre_hook(lambda *args, name=name: seen.append(f"before {name}"))
    before = model(inputs())
    expected = seen.copy()
    seen.clear()
    torch.manual_seed(0)
    fastlm.patch(model)
    assert seen == []
    model(inputs())
    assert seen == expected
    assert before.shape == (2, SEQ, 50)


def test_report_says_what_was_done():
    model = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8), OwnNorm(8), OwnNorm(8), nn.Linear(8, 8)])
    report = fastlm.patch(model)
    assert str(report) == "\n".join(
        [
            "fastlm.patch: 2 modules swapped, 2 left alone",
            "     2 x LayerNorm",
            "  left alone: 2 and 1 more (OwnNorm): a subclass of LayerNorm may compute something else",
        ]
    )
    assert report.to_dict() == {
        "swapped": [
            {"name": name, "class": "LayerNorm", "reason": "proved equal; now fastlm.nn.LayerNorm"}
            for name in ("0", "1")
        ],
        "left_alone": [
            {
                "name": name,
                "class": "OwnNorm",
                "reason": "a subclass of LayerNorm may compute something else",
            }
            for name in ("2", "3")
        ],
    }


def test_patch_refuses_what_is_not_a_module():
    with pytest.raises(TypeError, match="patch: model must be a torch.nn.Module, got dict"):
        fastlm.patch({})


def test_patched_model_trains():
    model = Model(dropout=0.1)
    fastlm.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x, target = inputs(), torch.randint(0, 50, (2, SEQ))
    loss_of, losses = fastlm.nn.CrossEntropyLoss(), []
    for _ in range(30):
        loss = loss_of(model(x).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_evaluation_path_runs_the_kernels():
    model = Model(norm_first=False).eval()
    fastlm.patch(model)
    with torch.no_grad(), KernelCalls() as calls:  # where torch's layer would take its fast path
        model(inputs())
    assert {"attention.cpu", "feed_forward.cpu", "layer_norm.cpu"} <= set(calls.names)


@pytest.mark.parametrize("training", [True, False])
def test_patched_model_compiles_to_one_graph_of_the_same_kernels(training):
    model, x = Model().train(training), inputs()
    fastlm.patch(model)

    def gradients(call):
        torch.manual_seed(3)  # dropout's seeds are drawn
        with torch.profiler.profile() as profile:
            found = torch.autograd.grad(call(x).square().sum(), list(model.parameters())[1:])
        return found, {event.key for event in profile.key_averages() if event.key.startswith("fastlm::")}

    eager, kernels = gradients(model)
    found, compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert kernels == compiled >= {"fastlm::attention", "fastlm::attention_backward", "fastlm::layer_norm"}
    for got, expected in zip(found, eager, strict=True):
        torch.testing.assert_close(got, expected)
