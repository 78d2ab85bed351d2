"""A module beside its torch.nn twin: the same weights, and the 2x rule for outputs and gradients."""

import copy

import torch

from fastlm.testing.compare import KernelCalls, judge


def pair(ours, twin, *args, **options):
    """(ours, twin) built alike, with one set of weights."""
    made, other = ours(*args, **options), twin(*args, **options)
    made.load_state_dict(other.state_dict())
    return made, other


def _run(module, run, inputs, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output = run(module, *inputs)
    generator = torch.Generator().manual_seed(5)
    dy = torch.randn(output.shape, generator=generator).to(inputs[0].dtype)
    leaves = {f"input {i}": x for i, x in enumerate(inputs)}
    leaves |= {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output, list(leaves.values()), dy.to(output.dtype), allow_unused=True)
    gradients = {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)
    }
    return {"output": output} | gradients


def assert_alike(ours, twin, inputs, run=lambda module, *inputs: module(*inputs)):
    """Fails unless ours is at most twice as far from the float64 twin as the twin is.

    run: (module, *inputs) -> a tensor. Returns: the names of the kernels that ours ran.
    """
    dtype = inputs[0].dtype
    ref = _run(copy.deepcopy(twin).double(), run, inputs, torch.float64)
    low = _run(twin, run, inputs, dtype)
    with KernelCalls() as calls:
        got = _run(ours, run, inputs, dtype)
    verdicts = [judge(name, got[name], low[name], ref[name]) for name in got]
    assert all(v.ratio <= 1 for v in verdicts), "\n".join(map(str, verdicts))
    return {name.partition(".")[0] for name in calls.names}
