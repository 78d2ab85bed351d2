"""GatedFeedForward: Linear, gate, Linear on ops.glu: SwiGLU, GeGLU, ReGLU."""

from typing import Literal

import torch
from torch import Tensor, nn

from . import _fused
from .feed_forward import ACTIVATIONS


class GatedFeedForward(nn.Module):
    """The gated network of a Transformer: down_proj(act_fn(gate_proj(x)) * up_proj(x)).

    Its state_dict has the keys gate_proj.weight, up_proj.weight and down_proj.weight (and .bias), as the MLP
    of Hugging Face's Llama, of which `fastlm.patch` makes one.

    Args:
        d_model: size of the last axis of input and output; dim_feedforward: size of the hidden axis.
        activation: of the gate: "silu" for SwiGLU, "gelu" or "gelu_tanh" for GeGLU, "relu" for ReGLU.
        bias: whether the linear layers learn a bias; device, dtype: of the parameters.

    Raises:
        ValueError: for another activation.

    Source: Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"GatedFeedForward: activation must be one of {known}, got {activation!r}")
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(d_model, dim_feedforward, **options)
        self.up_proj = nn.Linear(d_model, dim_feedforward, **options)
        self.down_proj = nn.Linear(dim_feedforward, d_model, **options)
        self.act_fn = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_model]; returns a tensor of its shape."""
        return self.down_proj(_fused.gate(self.gate_proj(x), self.act_fn, self.up_proj(x)))
