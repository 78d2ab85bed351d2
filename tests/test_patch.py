"""fastlm.patch: each of its promises is a test."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from twins import assert_alike

import fastlm
from fastlm.integrations import _adapters
from fastlm.testing.compare import KernelCalls

DIM, SEQ = 32, 9


class _Model(nn.Module):
    """A language model as PyTorch's tutorials write it, which knows nothing of fastlm."""

    def __init__(self, norm_first=True, dropout=0.1):
        super().__init__()
        self.embedding = nn.Embedding(50, DIM)
        layer = nn.TransformerEncoderLayer(
            DIM, 4, 48, dropout, "gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, 48), nn.ReLU(), nn.Dropout(dropout), nn.Linear(48, DIM))
        self.decoder = nn.TransformerDecoderLayer(DIM, 4, 48, dropout, batch_first=True)
        self.head = nn.Linear(DIM, 50)

    def forward(self, embedded):
        mask = nn.Transformer.generate_square_subsequent_mask(embedded.shape[1], dtype=embedded.dtype)
        encoded = self.encoder(embedded, mask=mask)
        return self.head(self.mlp(self.decoder(embedded, encoded, tgt_mask=mask)))


def inputs():
    return torch.randn(2, SEQ, DIM)


class _OwnNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_patched_model_computes_what_it_did_on_kernels(norm_first):
    model = _Model(norm_first).eval()
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
    model = _Model().eval().to(dtype)
    twin = copy.deepcopy(model)
    assert not fastlm.patch(model).left_alone
    with torch.no_grad():
        assert model(inputs().to(dtype)).dtype == twin(inputs().to(dtype)).dtype == dtype


def test_every_class_of_the_table_is_swapped_to_an_importable_class():
    made = {
        nn.LayerNorm: (4,),
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
    model, x = _Model().eval(), inputs()
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
    model = _Model()
    with fastlm.patched(model) as report:
        assert type(model.encoder) is fastlm.nn.TransformerEncoder and report.swapped
    assert type(model.encoder) is nn.TransformerEncoder
    with pytest.raises(KeyError), fastlm.patched(model):
        raise KeyError
    assert type(model.encoder) is nn.TransformerEncoder


def test_patching_twice_changes_nothing():
    model = _Model()
    fastlm.patch(model)
    kinds = [type(m) for m in model.modules()]
    again = fastlm.patch(model)
    assert again.to_dict() == {"swapped": [], "left_alone": []}
    again.undo()
    assert [type(m) for m in model.modules()] == kinds


def test_pickle_and_deepcopy_work():
    model, x = _Model().eval(), inputs()
    fastlm.patch(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(x), model(x))


def test_parameters_keys_names_and_modes_are_kept():
    model = _Model()
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
    model = _Model()
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
    own = _OwnNorm(DIM)
    assert [a.name for a in fastlm.patch(nn.ModuleList([own, nn.ModuleList([own])])).left_alone] == ["0"]


def test_hooks_are_kept_and_never_called_by_the_proof():
    model, seen = _Model().eval(), []
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
    norm, x = _OwnNorm(8), torch.randn(3, 8)
    before = norm(x)
    assert reason_for(norm) == "a subclass of LayerNorm may compute something else"
    assert type(norm) is _OwnNorm and torch.equal(norm(x), before)


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
    report = fastlm.patch(_Model())
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


def test_report_says_what_was_done():
    model = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8), _OwnNorm(8), _OwnNorm(8), nn.Linear(8, 8)])
    report = fastlm.patch(model)
    assert str(report) == "\n".join(
        [
            "fastlm.patch: 2 modules swapped, 2 left alone",
            "     2 x LayerNorm",
            "  left alone: 2 and 1 more (_OwnNorm): a subclass of LayerNorm may compute something else",
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
                "class": "_OwnNorm",
                "reason": "a subclass of LayerNorm may compute something else",
            }
            for name in ("2", "3")
        ],
    }


def test_patch_refuses_what_is_not_a_module():
    with pytest.raises(TypeError, match="patch: model must be a torch.nn.Module, got dict"):
        fastlm.patch({})


def test_patched_model_trains():
    model = _Model(dropout=0.1)
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
    model = _Model(norm_first=False).eval()
    fastlm.patch(model)
    with torch.no_grad(), KernelCalls() as calls:  # where torch's layer would take its fast path
        model(inputs())
    assert {"attention.cpu", "feed_forward.cpu", "layer_norm.cpu"} <= set(calls.names)
