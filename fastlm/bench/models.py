"""A GPT's training step: plain torch, compiled, and with fastlm; also where its logits are far apart.

fastlm's side is the same model patched, its head and loss joined into linear_cross_entropy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import fastlm

from .. import ops
from ..examples.plain_gpt import PlainGPT
from .ceilings import Ceilings
from .clock import clock_of, interleaved
from .measure import Row, row_of
from .workload import DTYPES, Work

_CONFIDENCE = 20.0  # deviation of a confident model's logits: a quarter of their gradient is denormal
_STRESS_S = 30.0  # after that no new round of the stressed step begins


@dataclass(frozen=True)
class Gpt:
    """A model and its batch. context: in tokens. confident: logits tens apart. dtype: of weights and all."""

    name: str
    layers: int
    dim: int
    heads: int
    vocab: int
    batch: int
    context: int
    dropout: float = 0.0
    confident: bool = False
    dtype: str = "f32"

    def on(self, device: str) -> "Gpt":
        """The model as it is measured on a device: on a GPU in bfloat16, with a batch that fills it."""
        if torch.device(device).type != "cuda" or self in STRESS:
            return self
        return replace(self, dtype="bf16", batch=16, context=1024)

    @property
    def title(self) -> str:
        """Such as "gpt_step gpt2 [4,768,50257,4,256]"."""
        return f"gpt_step {self.name} [{','.join(map(str, self.size))}]"

    @property
    def size(self) -> tuple[int, ...]:
        """Layers, width, vocabulary, sequences, tokens in each."""
        return (self.layers, self.dim, self.vocab, self.batch, self.context)

    def model(self, device: str) -> PlainGPT:
        """The plain model in training mode, the same weights each time."""
        torch.manual_seed(0)
        made = PlainGPT(self.vocab, self.dim, self.heads, self.layers, self.context, self.dropout)
        if self.confident:
            with torch.no_grad():  # the last norm's output has deviation 1
                made.head.weight.normal_(std=_CONFIDENCE * self.dim**-0.5)
        return made.to(device, DTYPES[self.dtype])

    def batch_of(self, device: str) -> tuple[Tensor, Tensor]:
        """Random tokens and targets."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.batch, self.context)
        return torch.randint(self.vocab, shape, generator=generator).to(device).unbind()


GPT2 = {"layers": 4, "dim": 768, "heads": 12, "vocab": 50257, "batch": 4, "context": 256}
SMALL = {"layers": 2, "dim": 256, "heads": 4, "vocab": 8192, "batch": 4, "context": 128}
MODELS = [Gpt("gpt2", **GPT2), Gpt("gpt2_dropout", **GPT2, dropout=0.1)]
MODEL_NAMES = [*(m.name for m in MODELS), "stress"]
STRESS_TITLE = "gpt_step stress: fresh and confident"
STRESS = [Gpt("fresh", **SMALL), Gpt("confident", **SMALL, confident=True)]


def work(gpt: Gpt, parameters: int) -> Work:
    """A step's matmuls, forward and twice in backward, and the optimiser's traffic; they add up.

    Attention is causal and has 2.5 times the work in backward. AdamW reads parameter, gradient and two
    moments, and writes three of them; activations are left out.
    """
    tokens = gpt.batch * gpt.context
    linear = 6 * tokens * gpt.dim * (12 * gpt.dim * gpt.layers + gpt.vocab)
    attention = 3.5 * 2 * tokens * (gpt.context + 1) * gpt.dim * gpt.layers
    return Work(7 * DTYPES[gpt.dtype].itemsize * parameters, linear + attention, adds_up=True)


def loss_by_fastlm(model: PlainGPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """What PlainGPT.forward returns, through linear_cross_entropy: the logits are never there as a whole."""
    seq = tokens.shape[1]
    x = model.position(model.embedding(tokens) * math.sqrt(model.dim))
    x = model.encoder(x, mask=model.mask[:seq, :seq], is_causal=True)
    return ops.linear_cross_entropy(x, model.head.weight, targets, bias=model.head.bias)


def training_step(model: nn.Module, loss_of: Callable, tokens: Tensor, targets: Tensor) -> Callable:
    """A step with fused AdamW, which keeps its weights (learning rate 0): each step is the same work."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> tuple:
        loss = loss_of(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach(),)

    return step


def builders(gpt: Gpt, device: str, baselines, backends) -> dict[str, Callable[[], Callable]]:
    """Side -> what makes its training step."""
    batch = gpt.batch_of(device)
    found = {name: partial(_torchs, gpt, device, name, batch) for name in ("eager", "compile")}
    found = {name: make for name, make in found.items() if name in baselines}
    for backend in backends:
        name = "fastlm" if backend is None else f"fastlm.{backend}"
        found[name] = partial(_fastlms, gpt, device, backend, batch)
    return found


def _torchs(gpt: Gpt, device: str, name: str, batch: tuple[Tensor, Tensor]) -> Callable:
    model = gpt.model(device)
    return training_step(model, torch.compile(model, dynamic=False) if name == "compile" else model, *batch)


def _fastlms(gpt: Gpt, device: str, backend: str | None, batch: tuple[Tensor, Tensor]) -> Callable:
    model = gpt.model(device)
    fastlm.patch(model)
    return training_step(model, _on_backend(model, backend), *batch)


def row_of_steps(gpt: Gpt, steps: dict[str, Callable]) -> Row:
    """The model's training steps as what is to be measured."""
    with torch.device("meta"):
        model = PlainGPT(gpt.vocab, gpt.dim, gpt.heads, gpt.layers, gpt.context)
    parameters = sum(p.numel() for p in model.parameters())
    return Row("gpt_step", gpt.name, gpt.size, gpt.dtype, "both", steps, work(gpt, parameters))


def row(gpt: Gpt, device: str, baselines, backends) -> Row:
    """The model's training step on every side, to be measured."""
    made = builders(gpt, device, baselines, backends)
    return row_of_steps(gpt, {name: make() for name, make in made.items()})


def _on_backend(model: nn.Module, backend: str | None) -> Callable:
    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        with fastlm.use_backend(backend):
            return loss_by_fastlm(model, tokens, targets)

    return loss_of


def stress_rows(device: str, baselines, backends, rounds: int) -> list[dict]:
    """The rows of a fresh and of a confident model's step, all timed in turn; at most about a minute.

    With torch alone the confident one's step may take many times as long: its gradients are denormal.
    """
    rows = [row(gpt, device, [b for b in baselines if b == "eager"], backends) for gpt in STRESS]
    steps = {f"{r.name} {side}": step for r in rows for side, step in r.steps.items()}
    ceilings = Ceilings(device, "f32")
    times = interleaved(ceilings.steps | steps, rounds, clock_of(device), _STRESS_S)
    rates = ceilings.rates(times)
    return [row_of(r, {side: times[f"{r.name} {side}"] for side in r.steps}, rates) for r in rows]
