"""The demo's two proofs: the patched model computes the same, and trains alike while it is timed."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .._op import OPS
from ..testing.compare import KernelCalls, Verdict, judge
from .demo_model import make_optimizer, train_step

WARM_UP = 3  # steps left out of the timings: first-touch memory, thread start, the optimiser's state


def parity(original: nn.Module, patched: nn.Module, tokens: Tensor, targets: Tensor) -> list[Verdict]:
    """Judges the logits, the loss and every parameter's gradient in eval mode by the 2x rule.

    The original in float64 is the truth, the original in its own precision sets what is allowed.
    """
    models = (patched, original, copy.deepcopy(original).double())
    got, low, ref = (_logits_and_gradients(model, tokens, targets) for model in models)
    return [judge(name, got[name], low[name], ref[name]) for name in ref]


def _logits_and_gradients(model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    training = model.training
    model.eval()
    named = list(model.named_parameters())
    loss = model(tokens, targets)
    # the sum over tokens: gradients of the mean are so small that the rule's eps term would hide an error
    grads = torch.autograd.grad(loss * targets.numel(), [p for _, p in named])
    found = {"logits": model(tokens).detach(), "loss": loss.detach()}
    model.train(training)
    return found | {f"gradient of {n}": g for (n, _), g in zip(named, grads, strict=True)}


@dataclass
class Run:
    """What one model's training gave: the loss and the seconds of each step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def tokens_per_s(self, tokens: int) -> float:
        """Tokens a second at the median step of `tokens` tokens, warm-up left out."""
        return tokens / statistics.median(self.seconds[min(WARM_UP, len(self.seconds) - 1) :])


def train_in_turn(
    models: dict[str, nn.Module], pairs: Iterable[tuple[Tensor, Tensor]], done: Callable[[], None]
) -> dict[str, Run]:
    """Trains every model on the same batches, in turn and in alternating order; calls `done` after each."""
    runs = {name: Run() for name in models}
    optimizers = {name: make_optimizer(model) for name, model in models.items()}
    order = list(models)
    for tokens, targets in pairs:
        for name in order:
            start = time.perf_counter()
            runs[name].losses.append(train_step(models[name], optimizers[name], tokens, targets))
            runs[name].seconds.append(time.perf_counter() - start)
        order.reverse()
        done()
    return runs


def curves(baseline: list[float], fastlm: list[float]) -> dict[str, float | bool | None]:
    """Whether both losses fell (None below 10 steps) and stayed together (mean distance at most 5%)."""
    mean, part = statistics.fmean, len(baseline) // 5
    gap = mean(abs(a - b) for a, b in zip(baseline, fastlm, strict=True)) / mean(baseline)
    fell = all(mean(x[-part:]) < mean(x[:part]) for x in (baseline, fastlm)) if part > 1 else None
    return {"fell": fell, "together": gap <= 0.05, "mean_relative_distance": gap}


def backends_of_a_step(model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, str]:
    """Op -> the backend, or backends, on which one forward and backward really ran it."""
    with _reference_calls() as referenced, KernelCalls() as calls:
        model(tokens, targets).backward()
    model.zero_grad()
    found: dict[str, set[str]] = {}
    for name in [*calls.names, *referenced]:
        op, backend = name.split(".")
        found.setdefault(op.removesuffix("_backward"), set()).add(backend)
    return {op: " and ".join(sorted(backends)) for op, backends in sorted(found.items())}


@contextmanager
def _reference_calls() -> Iterator[list[str]]:
    """Collects "<op>.reference" for each op that runs by its reference, which calls no kernel."""
    names: list[str] = []

    def recording(op):
        def run(args):
            names.append(f"{op.name}.reference")
            return type(op).run_reference(op, args)

        return run

    for op in OPS.values():
        op.run_reference = recording(op)
    try:
        yield names
    finally:
        for op in OPS.values():
            del op.run_reference
