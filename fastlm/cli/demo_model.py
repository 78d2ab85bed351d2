"""The demo's model, its size, and one training step: torch's defaults, whatever the layers are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..examples.plain_gpt import PlainGPT


@dataclass(frozen=True)
class Size:
    """How large the demo's model and batches are. context: in tokens. batch: sequences in a step."""

    vocab: int = 4096
    dim: int = 256
    heads: int = 4
    layers: int = 4
    context: int = 256
    batch: int = 8


def make_model(size: Size, device: torch.device) -> nn.Module:
    """The plain model, in training mode, with new random weights."""
    return PlainGPT(size.vocab, size.dim, size.heads, size.layers, size.context).to(device)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with torch's defaults (learning rate 1e-3)."""
    return torch.optim.AdamW(model.parameters())


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor) -> float:
    """One step forward, backward and of the optimiser; returns the loss, in nats per token."""
    optimizer.zero_grad()
    loss = model(tokens, targets)
    loss.backward()
    optimizer.step()
    return loss.item()
