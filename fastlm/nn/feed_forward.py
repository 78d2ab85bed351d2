"""FeedForward: Linear, activation, Dropout, Linear on ops.feed_forward."""

from typing import Literal

import torch
from torch import Tensor, nn

from . import _fused

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class FeedForward(nn.Module):
    """The position-wise network of a Transformer: linear2(dropout(activation(linear1(x)))).

    Its state_dict has the keys linear1.weight, linear1.bias, linear2.weight and linear2.bias, as the layers
    of torch.nn.TransformerEncoderLayer.

    Args:
        d_model: size of the last axis of input and output; dim_feedforward: size of the hidden axis.
        dropout: probability in [0, 1] that a hidden element is set to 0 while training.
        activation: of the hidden layer.
        bias: whether the linear layers learn a bias; device, dtype: of the parameters.

    Raises:
        ValueError: for another activation.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"FeedForward: activation must be one of {known}, got {activation!r}")
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, device=device, dtype=dtype)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., d_model]; returns a tensor of its shape."""
        return _fused.feed_forward(input, self.linear1, self.activation, self.dropout, self.linear2)
