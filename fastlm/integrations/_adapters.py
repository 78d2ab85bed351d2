"""Which torch.nn modules fastlm.patch swaps: for each its class, the refusals and the trials of its proof."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .. import nn as fastlm_nn
from ..nn.sequential import chain_at
from ..testing.cases import Draw
from ._proof import Trial

BATCH, SEQ, _MEMORY = 3, 17, 11  # odd sizes: they end inside a tile


@dataclass(frozen=True)
class Adapter:
    """One row of the table.

    new: the class that an instance gets. trials: (module, draw) -> calls that prove it. why_not: module ->
    a reason to leave it alone, or None. applies: whether the module is of interest at all. part: what of it
    is proved.
    """

    new: type[nn.Module]
    trials: Callable[[nn.Module, Draw], list[Trial]]
    why_not: Callable[[nn.Module], str | None] = lambda module: None
    applies: Callable[[nn.Module], bool] = lambda module: True
    part: Callable[[nn.Module], nn.Module] = lambda module: module


def call(module, *inputs):
    """What most trials run."""
    return module(*inputs)


def _later(size):
    """The boolean causal mask of torch.nn: True = excluded."""
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def _padding(device, keys):
    """The last keys of one sequence and the first key of another are padding."""
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[0, -3:] = padding[1, 0] = True
    return padding.to(device)


def _norm_trials(norm, draw):
    return [Trial("rows", call, (draw.normal(BATCH, SEQ, *norm.normalized_shape),))]


def _dropout_why_not(dropout):
    if dropout.inplace:
        return "inplace=True runs through torch: a fastlm op never writes to its inputs"
    return "p=1 runs through torch" if dropout.p == 1.0 else None


def _dropout_trials(dropout, draw):
    return [Trial("evaluation", call, (draw.normal(SEQ, 41),))]


def _softmax_trials(softmax, draw):
    dims = max(2, softmax.dim + 1, -softmax.dim)
    return [Trial("rows", call, (draw.normal(*range(3, 3 + dims)),))]


def _cross_entropy_trials(loss, draw):
    flat, deep = draw.integers(0, 13, SEQ), draw.integers(0, 13, 2, 5)
    flat[0] = loss.ignore_index
    return [
        Trial("[N, C]", lambda m, x: m(x, flat.to(x.device)), (draw.normal(SEQ, 13),)),
        Trial("[N, C, d]", lambda m, x: m(x, deep.to(x.device)), (draw.normal(2, 13, 5),)),
    ]


def _chains(sequential):
    children = list(sequential)
    found = ((i, chain_at(children, i)) for i in range(len(children)))
    return [(i, chain) for i, chain in found if chain is not None]


def _looks_like_a_chain(sequential):
    activation = (nn.GELU, nn.ReLU, nn.SiLU)
    forms = (nn.Linear, activation, nn.Linear), (nn.Linear, activation, nn.Dropout, nn.Linear)
    children = list(sequential)
    windows = ((children[i : i + len(form)], form) for form in forms for i in range(len(children)))
    return any(len(w) == len(form) and all(map(isinstance, w, form)) for w, form in windows)


def _sequential_why_not(sequential):
    return None if _chains(sequential) else "a part of its chain has hooks, a subclass or a parametrisation"


def _sequential_trials(sequential, draw):
    made = []
    for start, (linear, *_, steps) in _chains(sequential):
        part = slice(start, start + steps)
        made.append(
            Trial(
                f"children {start} to {start + steps - 1}",
                lambda m, x, part=part: m[part](x),
                (draw.normal(BATCH, SEQ, linear.in_features),),
            )
        )
    return made


def _attention_trials(attention, draw):
    def sequence(seq, size):
        return draw.normal(*((BATCH, seq, size) if attention.batch_first else (seq, BATCH, size)))

    def across(m, q, k, v):
        return m(q, k, v, _padding(q.device, _MEMORY), need_weights=False)[0]

    def causal(m, x):
        return m(x, x, x, attn_mask=_later(SEQ).to(x.device), need_weights=False)[0]

    inputs = (
        sequence(SEQ, attention.embed_dim),
        sequence(_MEMORY, attention.kdim),
        sequence(_MEMORY, attention.vdim),
    )
    made = [Trial("cross-attention with padding", across, inputs)]
    return [*made, Trial("causal", causal, inputs[:1])] if attention._qkv_same_embed_dim else made


def _attention_why_not(attention):
    extra = attention.bias_k is not None or attention.add_zero_attn
    return "bias_k, bias_v and add_zero_attn run through torch" if extra else None


def _sequence(layer, draw, seq=SEQ):
    attention = layer.self_attn
    shape = (BATCH, seq) if attention.batch_first else (seq, BATCH)
    return draw.normal(*shape, attention.embed_dim)


def _encoder_trials(encoder, draw):
    x = (_sequence(encoder.layers[0] if hasattr(encoder, "layers") else encoder, draw),)
    return [
        Trial("causal", lambda m, x: m(x, _later(SEQ).to(x.device)), x),
        Trial("padding", lambda m, x: m(x, src_key_padding_mask=_padding(x.device, SEQ)), x),
    ]


def _encoder_why_not(encoder):
    ours = all(type(layer) is fastlm_nn.TransformerEncoderLayer for layer in encoder.layers)
    return None if ours and len(encoder.layers) else "one of its layers was left alone"


def _two_layers(encoder):
    """The encoder with its first two layers, which prove as much as all of them in less memory."""
    part = object.__new__(type(encoder))
    layers = {"layers": nn.ModuleList(list(encoder.layers)[:2])}
    part.__dict__.update(encoder.__dict__ | {"_modules": encoder._modules | layers})
    return part


def _decoder_trials(layer, draw):
    inputs = _sequence(layer, draw), _sequence(layer, draw, _MEMORY)

    def run(m, tgt, memory):
        padding = _padding(tgt.device, _MEMORY)
        return m(tgt, memory, tgt_mask=_later(SEQ).to(tgt.device), memory_key_padding_mask=padding)

    return [Trial("causal, memory padded", run, inputs)]


TABLE: dict[type[nn.Module], Adapter] = {
    nn.LayerNorm: Adapter(fastlm_nn.LayerNorm, _norm_trials),
    nn.RMSNorm: Adapter(fastlm_nn.RMSNorm, _norm_trials),
    nn.Dropout: Adapter(fastlm_nn.Dropout, _dropout_trials, _dropout_why_not),
    nn.Softmax: Adapter(
        fastlm_nn.Softmax, _softmax_trials, lambda m: "dim=None runs through torch" if m.dim is None else None
    ),
    nn.Sequential: Adapter(
        fastlm_nn.Sequential, _sequential_trials, _sequential_why_not, applies=_looks_like_a_chain
    ),
    nn.MultiheadAttention: Adapter(fastlm_nn.MultiheadAttention, _attention_trials, _attention_why_not),
    nn.TransformerEncoderLayer: Adapter(fastlm_nn.TransformerEncoderLayer, _encoder_trials),
    nn.TransformerEncoder: Adapter(
        fastlm_nn.TransformerEncoder, _encoder_trials, _encoder_why_not, part=_two_layers
    ),
    nn.TransformerDecoderLayer: Adapter(fastlm_nn.TransformerDecoderLayer, _decoder_trials),
    nn.CrossEntropyLoss: Adapter(
        fastlm_nn.CrossEntropyLoss,
        _cross_entropy_trials,
        lambda m: "class weights run through torch" if m.weight is not None else None,
    ),
}
