"""Proves on copies that a module computes the same in its fastlm class: the 2x rule, with gradients."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..testing.compare import InFloat64, judge


class Trial(NamedTuple):
    """One call of a module: run(module, *inputs) returns a tensor."""

    name: str
    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def bare_copy(
    module: nn.Module,
    class_of: Callable[[nn.Module], type],
    dtype: torch.dtype | None = None,
    copies: dict | None = None,
) -> nn.Module:
    """A copy in evaluation mode, without hooks, its parameters fresh leaves; what is shared stays shared.

    class_of: module -> the class of its copy. dtype: of the copy's floating tensors; None keeps theirs.
    """
    copies = {} if copies is None else copies
    if id(module) in copies:
        return copies[id(module)]
    copied = copies[id(module)] = object.__new__(class_of(module))
    hooks = {name: OrderedDict() for name in module.__dict__ if "_hooks" in name}
    copied.__dict__.update(module.__dict__ | hooks | {"training": False, "_compiled_call_impl": None})
    for kind in ("_parameters", "_buffers"):
        tensors = {n: t if t is None else _copy(t, dtype, copies) for n, t in getattr(module, kind).items()}
        copied.__dict__[kind] = tensors
    children = module._modules.items()
    copied.__dict__["_modules"] = {
        n: m if m is None else bare_copy(m, class_of, dtype, copies) for n, m in children
    }
    return copied


def _copy(t: Tensor, dtype: torch.dtype | None, copies: dict) -> Tensor:
    if id(t) not in copies:
        made = t.detach().clone()
        made = made.to(dtype) if dtype is not None and made.is_floating_point() else made
        is_parameter = isinstance(t, nn.Parameter)
        copies[id(t)] = nn.Parameter(made, made.is_floating_point()) if is_parameter else made
    return copies[id(t)]


def _run(module: nn.Module, trial: Trial, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The output and the gradients of inputs and parameters, by name."""
    inputs = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in trial.inputs]
    leaves = {f"input {i}": x for i, x in enumerate(inputs)}
    leaves |= {n: p for n, p in module.named_parameters() if p.requires_grad}
    output = trial.run(module, *inputs)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(output.shape, generator=generator).to(trial.inputs[0].dtype).to(output)
    found = torch.autograd.grad(output, list(leaves.values()), dy, allow_unused=True)
    gradients = {
        f"gradient of {n}": torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), found, strict=True)
    }
    return {"output": output} | gradients


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inputs this small gain nothing from threads; on a busy machine waiting for them took 50 s a model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def refusal(
    module: nn.Module,
    trials: list[Trial],
    before: Callable[[nn.Module], type],
    after: Callable[[nn.Module], type],
) -> str | None:
    """None if copies of `module` in their classes `before` and `after` compute the same, else the reason.

    Neither the module, its gradients, nor any random generator is touched.
    """
    device = trials[0].inputs[0].device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(device.type, enabled=False), _one_thread():
                return _first_difference(module, trials, before, after)
    except Exception as error:  # of whatever the module's own parts do on inputs that were made up here
        words = (str(error).splitlines() or [""])[0][:200]
        return f"its proof did not run: {type(error).__name__}: {words}"


def _first_difference(module, trials, before, after) -> str | None:
    ref, low, got = (
        bare_copy(module, classes, dtype)
        for classes, dtype in ((before, torch.float64), (before, None), (after, None))
    )
    for trial in trials:
        with InFloat64():
            right = _run(ref, trial, torch.float64)
        plain = _run(low, trial, None)
        for name, tensor in _run(got, trial, None).items():
            verdict = judge(name, tensor, plain[name], right[name])
            if not verdict.ratio <= 1:
                return f"its proof failed ({trial.name}): {verdict}"
    return None
