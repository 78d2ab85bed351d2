"""MultiheadAttention beside its torch.nn twin."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from twins import (
    BATCH,
    DIM,
    HEADS,
    SEQ,
    assert_alike,
    later,
    pair,
    scattered,
    sequence,
)

import fastlm

ATTENTIONS = {
    "packed": ({}, "self"),
    "seq-first": ({"batch_first": False}, "self"),
    "no-bias": ({"bias": False}, "self"),
    "keys-are-values": ({}, "memory"),
    "three-inputs": ({}, "three"),
    "kdim-vdim": ({"kdim": 20, "vdim": 24}, "three"),
    "unbatched": ({}, "unbatched"),
}


@pytest.mark.parametrize(("options", "inputs"), ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_attention_computes_what_its_twin_does(options, inputs):
    options = {"batch_first": True} | options
    ours, twin = pair(fastlm.nn.MultiheadAttention, nn.MultiheadAttention, DIM, HEADS, **options)
    x, memory = sequence(options["batch_first"]), sequence(options["batch_first"], 6)
    given, run = {
        "self": ([x], lambda m, x: m(x, x, x, need_weights=False)[0]),
        "memory": ([x, memory], lambda m, q, k: m(q, k, k, need_weights=False)[0]),
        "three": (
            [x, sequence(seq=6, dim=twin.kdim), sequence(seq=6, dim=twin.vdim)],
            lambda m, *x: m(*x, need_weights=False)[0],
        ),
        "unbatched": (
            [x[0]],
            lambda m, x: m(x, x, x, torch.arange(SEQ) > 7, False, scattered()[:HEADS])[0],
        ),
    }[inputs]
    assert assert_alike(ours, twin, given, run) >= {"attention", "attention_backward"}


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_weights_and_extra_keys_run_through_torch(options, average):
    options |= {"batch_first": True}
    ours, twin = pair(fastlm.nn.MultiheadAttention, nn.MultiheadAttention, DIM, HEADS, **options)
    x = sequence()
    for need_weights in (True, False):
        call = {"need_weights": need_weights, "average_attn_weights": average, "attn_mask": later()}
        (got, weights), (expected, others) = ours(x, x, x, **call), twin(x, x, x, **call)
        torch.testing.assert_close(got, expected)
        assert (weights is None) == (others is None) == (not need_weights)
        if need_weights:
            assert torch.equal(weights, others)


@pytest.mark.parametrize(
    "mask", [later(), nn.Transformer.generate_square_subsequent_mask(SEQ)], ids=["bool", "float"]
)
def test_a_mask_that_is_causal_becomes_causal_attention(mask, monkeypatch):
    seen = []
    original = fastlm.ops.attention
    monkeypatch.setattr(fastlm.ops, "attention", lambda *a, **k: seen.append(k) or original(*a, **k))
    attention, x = fastlm.nn.MultiheadAttention(DIM, HEADS, batch_first=True), sequence()
    other = mask.clone()
    other[0, 1] = 0
    for given in (mask, other, None):
        attention(x, x, x, attn_mask=given, need_weights=False)
    assert [k["causal"] for k in seen] == ["top_left", False, False]
    assert seen[0]["mask"] is None and seen[0]["bias"] is None
    assert (seen[1]["mask"] is None) != (seen[1]["bias"] is None)


def test_a_query_with_nothing_to_attend_to_gives_the_output_bias():
    attention, x = fastlm.nn.MultiheadAttention(DIM, HEADS, batch_first=True), sequence().requires_grad_()
    nn.init.normal_(attention.out_proj.bias)
    out = attention(x, x, x, torch.ones(BATCH, SEQ, dtype=torch.bool), need_weights=False)[0]
    assert torch.equal(out, attention.out_proj.bias.expand_as(out))
    out.sum().backward()
    assert x.grad.eq(0).all()
