"""A module beside its torch.nn twin: the same weights, masks, and the 2x rule for outputs and gradients."""

import copy

import torch
from torch import nn

from fastlm.testing.compare import InFloat64, KernelCalls, judge

BATCH, SEQ, HEADS, DIM, HIDDEN = 3, 10, 4, 32, 48


def pair(ours, twin, *args, **options):
    """(ours, twin) built alike, with one set of weights."""
    made, other = ours(*args, **options), twin(*args, **options)
    made.load_state_dict(other.state_dict())
    return made, other


def _run(module, run, inputs, dtype, draw):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output = run(module, *inputs)
    generator = torch.Generator().manual_seed(draw)
    dy = torch.randn(output.shape, generator=generator).to(inputs[0].dtype)
    leaves = {f"input {i}": x for i, x in enumerate(inputs)}
    leaves |= {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output, list(leaves.values()), dy.to(output.dtype), allow_unused=True)
    gradients = {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)
    }
    return {"output": output} | gradients


def assert_alike(ours, twin, inputs, run=lambda module, *inputs: module(*inputs)):
    """Fails unless ours is at most twice as far from the float64 twin as the twin is, over three draws of dy.

    run: (module, *inputs) -> a tensor. Returns: the names of the kernels that ours ran.
    """
    dtype = inputs[0].dtype
    wide = copy.deepcopy(twin).double()
    results = []
    for draw in range(3):
        with InFloat64():
            ref = _run(wide, run, inputs, torch.float64, draw)
        low = _run(twin, run, inputs, dtype, draw)
        with KernelCalls() as calls:
            results.append((_run(ours, run, inputs, dtype, draw), low, ref))
    names = results[0][0]
    verdicts = [judge(n, *(torch.stack([r[i][n] for r in results]) for i in range(3))) for n in names]
    assert all(v.ratio <= 1 for v in verdicts), "\n".join(map(str, verdicts))
    return {name.partition(".")[0] for name in calls.names}


def later(size=SEQ):
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def padding():
    mask = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    mask[0, -4:] = True
    mask[1, :2] = True
    return mask


def scattered():
    return (torch.rand(BATCH * HEADS, SEQ, SEQ) < 0.3) & ~torch.eye(SEQ, dtype=torch.bool)


MASKS = {
    "none": lambda: {},
    "causal-bool": lambda: {"src_mask": later()},
    "causal-float": lambda: {"src_mask": nn.Transformer.generate_square_subsequent_mask(SEQ)},
    "is-causal": lambda: {"src_mask": later(), "is_causal": True},
    "is-causal-padding": lambda: {
        "src_mask": later(),
        "is_causal": True,
        "src_key_padding_mask": torch.arange(SEQ).expand(BATCH, SEQ) >= 7,
    },
    "bool-per-head": lambda: {"src_mask": scattered()},
    "float": lambda: {"src_mask": torch.randn(SEQ, SEQ)},
    "float-per-head": lambda: {"src_mask": torch.randn(BATCH * HEADS, SEQ, SEQ)},
    "padding": lambda: {"src_key_padding_mask": padding()},
    "padding-float": lambda: {"src_key_padding_mask": torch.randn(BATCH, SEQ)},
    "padding-and-bool": lambda: {"src_key_padding_mask": padding(), "src_mask": scattered()},
    "padding-and-float": lambda: {
        "src_key_padding_mask": torch.randn(BATCH, SEQ),
        "src_mask": torch.randn(SEQ, SEQ),
    },
}


def as_given(masks, dtype):
    return {n: m.to(dtype) if torch.is_tensor(m) and m.is_floating_point() else m for n, m in masks.items()}


def sequence(batch_first=True, seq=SEQ, dim=DIM):
    return torch.randn(*((BATCH, seq) if batch_first else (seq, BATCH)), dim)
