"""Transformer modules beside their torch.nn twins: state_dict, outputs, gradients, masks, hooks."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from twins import (
    BATCH,
    DIM,
    HEADS,
    HIDDEN,
    MASKS,
    SEQ,
    as_given,
    assert_alike,
    later,
    padding,
    pair,
    sequence,
)

import fastlm
from fastlm.testing.compare import KernelCalls

TWINS = {
    "LayerNorm": (DIM,),
    "Dropout": (0.1,),
    "Softmax": (-1,),
    "CrossEntropyLoss": (torch.rand(5),),
    "MultiheadAttention": (DIM, HEADS),
    "TransformerEncoderLayer": (DIM, HEADS, HIDDEN),
    "TransformerDecoderLayer": (DIM, HEADS, HIDDEN),
}


@pytest.mark.parametrize("name", TWINS)
def test_state_dict_and_class_are_the_twins(name):
    ours, twin = getattr(fastlm.nn, name)(*TWINS[name]), getattr(nn, name)(*TWINS[name])
    assert isinstance(ours, getattr(nn, name))
    assert list(ours.state_dict()) == list(twin.state_dict())
    ours.load_state_dict(twin.state_dict())
    twin.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(twin)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "seq-first"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_encoder_layer_computes_what_its_twin_does(norm_first, batch_first, masks):
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": batch_first, "norm_first": norm_first}
    kinds = fastlm.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer
    ours, twin = pair(*kinds, DIM, HEADS, HIDDEN, **options)
    masks = masks()
    kernels = assert_alike(ours, twin, [sequence(batch_first)], lambda m, x: m(x, **as_given(masks, x.dtype)))
    assert kernels >= {"attention", "layer_norm", "feed_forward", "attention_backward", "layer_norm_backward"}
    assert ("dropout_add" in kernels) == norm_first


@pytest.mark.parametrize(
    "activation", ["relu", nn.functional.silu, torch.tanh], ids=["relu", "silu", "other"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_encoder_layer_takes_every_activation(activation, bias):
    kinds = fastlm.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer
    ours, twin = pair(*kinds, DIM, HEADS, HIDDEN, 0.0, activation, bias=bias)
    kernels = assert_alike(ours, twin, [sequence()])
    assert ("feed_forward" in kernels) == (activation is not torch.tanh)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoder_layer_works_in_half_precision(dtype):
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True, "dtype": dtype}
    kinds = fastlm.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer
    ours, twin = pair(*kinds, DIM, HEADS, HIDDEN, **options)
    assert_alike(ours, twin, [sequence().to(dtype)], lambda m, x: m(x, later(), padding()))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "seq-first"])
def test_decoder_layer_computes_what_its_twin_does(norm_first, batch_first):
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": batch_first, "norm_first": norm_first}
    kinds = fastlm.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer
    ours, twin = pair(*kinds, DIM, HEADS, HIDDEN, **options)
    masks = {
        "tgt_mask": later(7),
        "tgt_is_causal": True,
        "memory_mask": torch.rand(7, SEQ) < 0.3,
        "memory_key_padding_mask": torch.arange(SEQ).expand(BATCH, SEQ) == 9,
    }
    masks["memory_mask"][:, 0] = False
    inputs = [sequence(batch_first, 7), sequence(batch_first)]
    kernels = assert_alike(ours, twin, inputs, lambda m, tgt, memory: m(tgt, memory, **masks))
    assert kernels >= {"attention", "layer_norm", "feed_forward"}


def test_decoder_layer_runs_inside_torchs_decoder():
    kinds = fastlm.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer
    ours, twin = pair(*kinds, DIM, HEADS, HIDDEN, 0.0, "gelu")
    assert_alike(nn.TransformerDecoder(ours, 2), nn.TransformerDecoder(twin, 2), [sequence(), sequence()])


def encoders(**options):
    made = []
    for kind in (fastlm.nn, nn):
        layer = kind.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, batch_first=True, **options)
        made.append(kind.TransformerEncoder(layer, 2, kind.LayerNorm(DIM), enable_nested_tensor=False))
    made[0].load_state_dict(made[1].state_dict())
    return made


@pytest.mark.parametrize("is_causal", [None, True])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_encoder_computes_what_its_twin_does(norm_first, is_causal):
    ours, twin = encoders(norm_first=norm_first, activation="gelu")

    def run(module, x):
        mask = nn.Transformer.generate_square_subsequent_mask(SEQ, dtype=x.dtype)
        return module(x, mask=mask, is_causal=is_causal)

    assert assert_alike(ours, twin, [sequence()], run) >= {"attention", "layer_norm", "feed_forward"}


def test_padding_in_evaluation_keeps_the_shape_and_the_real_tokens():
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, batch_first=True)
    twin = nn.TransformerEncoder(layer, 2).eval()  # here torch takes its fast path, and nested tensors
    ours = fastlm.nn.TransformerEncoder(
        fastlm.nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, batch_first=True), 2
    )
    ours.load_state_dict(twin.state_dict())
    mask = torch.arange(SEQ).expand(BATCH, SEQ) >= 6  # all sequences are shorter than the batch
    x = sequence()
    with torch.no_grad(), KernelCalls() as calls:
        got = ours.eval()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        expected = twin(x, src_key_padding_mask=mask)
    assert got.shape == x.shape
    assert "attention.cpu" in calls.names
    torch.testing.assert_close(got[:, :6], expected[:, :6])


def test_encoder_gives_other_layers_the_floating_masks_that_torch_gives():
    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            seen.extend((src_mask.dtype, src_key_padding_mask.dtype, is_causal))
            return src

    seen = []
    encoder = fastlm.nn.TransformerEncoder(Layer(DIM, HEADS, HIDDEN, batch_first=True), 1)
    encoder(sequence(), mask=later(), src_key_padding_mask=padding())
    assert seen == [torch.float32, torch.float32, True]


def test_a_layer_inside_torchs_encoder_takes_its_nested_tensors():
    kinds = fastlm.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer
    layers = pair(*kinds, DIM, HEADS, HIDDEN, batch_first=True)
    ours, twin = (nn.TransformerEncoder(layer, 2).eval() for layer in layers)
    x, mask = sequence(), torch.arange(SEQ).expand(BATCH, SEQ) >= 6
    with torch.no_grad():
        assert torch.equal(ours(x, src_key_padding_mask=mask), twin(x, src_key_padding_mask=mask))


def test_wrong_inputs_are_refused_in_torchs_words():
    ours, twin = pair(fastlm.nn.MultiheadAttention, nn.MultiheadAttention, DIM, HEADS, batch_first=True)
    x = sequence()
    for options in ({"attn_mask": later(4)}, {"key_padding_mask": padding()[:, :3]}, {"is_causal": True}):
        with pytest.raises((RuntimeError, AssertionError)) as expected:
            twin(x, x, x, need_weights=False, **options)
        with pytest.raises(expected.type) as error:
            ours(x, x, x, need_weights=False, **options)
        assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("part", ["norm2", "dropout1", "linear1", "self_attn", "dropout2", "dropout"])
def test_a_hook_on_a_part_of_a_layer_is_called(part):
    layer, seen = fastlm.nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, norm_first=True), []
    x = sequence()
    plain = layer.eval()(x)
    getattr(layer, part).register_forward_hook(lambda *args: seen.append(part))
    torch.testing.assert_close(layer(x), plain)
    assert seen == [part]


def test_a_replaced_part_of_a_layer_is_called():
    layer = fastlm.nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, norm_first=True)
    layer.norm2, layer.linear2 = nn.RMSNorm(DIM), nn.Sequential(nn.Linear(HIDDEN, DIM), nn.Tanh())
    layer.dropout2 = nn.Identity()
    x = sequence()
    twin = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, norm_first=True)
    twin.norm2, twin.linear2, twin.dropout2 = layer.norm2, layer.linear2, layer.dropout2
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_every_dropout_of_a_layer_is_applied_in_training_only(name, norm_first):
    layer = getattr(fastlm.nn, name)(DIM, HEADS, HIDDEN, 0.0, norm_first=norm_first)
    inputs = [sequence()] * (2 if "Decoder" in name else 1)
    plain = layer(*inputs)
    for part in [m for m in layer.modules() if isinstance(m, nn.Dropout)]:
        part.p = 0.5
        assert not torch.equal(layer(*inputs), plain)
        assert torch.equal(layer.eval()(*inputs), plain)
        layer.train()
        part.p = 0.0
    layer.self_attn.dropout = 0.5
    assert not torch.equal(layer(*inputs), plain)


def autocast_pairs():
    for name, args in TWINS.items():
        yield pytest.param(*pair(getattr(fastlm.nn, name), getattr(nn, name), *args), id=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ours", "twin"), list(autocast_pairs()))
def test_autocast_returns_the_twins_dtype(ours, twin, cast, dtype):
    x = sequence().to(dtype)
    runs = {
        "MultiheadAttention": lambda m: m(x, x, x, need_weights=False)[0],
        "TransformerDecoderLayer": lambda m: m(x, x),
        "CrossEntropyLoss": lambda m: m(x.flatten(0, 1), torch.zeros(BATCH * SEQ, dtype=torch.int64)),
    }
    run = runs.get(type(twin).__name__, lambda m: m(x))
    if isinstance(ours, nn.CrossEntropyLoss):
        ours.weight = twin.weight = None
    with torch.autocast("cpu", cast):
        assert run(ours).dtype == run(twin).dtype


def test_checkpointing_repeats_the_dropout():
    layer = fastlm.nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.3, norm_first=True)
    x, grads = sequence(), []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        run(leaf).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_layer_compiles_to_one_graph():
    options = {"activation": "gelu", "norm_first": True, "batch_first": True}
    layer, x = fastlm.nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, **options), sequence()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for options in ({}, {"is_causal": True}):
        torch.testing.assert_close(compiled(x, later(), **options), layer(x, later(), **options))
