"""Stand-ins: modules of the structure that Hugging Face's Llama and Gemma have, in plain PyTorch."""

import torch
from torch import nn


class LlamaNorm(nn.Module):
    """Rounds the normed row to the input's dtype before the weight."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) + 1)
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        """[..., size] -> the same."""
        wide = hidden_states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class GemmaNorm(nn.Module):
    """Learns the weight's distance from 1, and rounds last."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.randn(size) / 2)

    def forward(self, x):
        """[..., size] -> the same."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class GatedMLP(nn.Module):
    """Three projections and an activation."""

    def __init__(self, size, hidden, act_fn, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=bias)
        self.up_proj = nn.Linear(size, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, size, bias=bias)
        self.act_fn = act_fn

    def forward(self, x):
        """[..., size] -> the same."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A pre-norm residual block of each kind."""

    def __init__(self, size=24, hidden=40, norm=LlamaNorm, act_fn=None):
        super().__init__()
        self.norm = norm(size)
        self.mlp = GatedMLP(size, hidden, act_fn or nn.SiLU())

    def forward(self, x):
        """[..., size] -> the same."""
        return x + self.mlp(self.norm(x))
