"""SinusoidalPositionalEncoding: adds sines and cosines of the position to the embeddings."""

import torch
from torch import Tensor, nn

from .dropout import Dropout


class SinusoidalPositionalEncoding(nn.Module):
    """y = dropout(x + PE), PE[pos, 2i] = sin(pos / 10000^(2i / d_model)), PE[pos, 2i + 1] = cos(of the same).

    The table is a buffer that the state_dict leaves out.

    Args:
        d_model: size of the last axis. max_len: the longest sequence.
        dropout: probability in [0, 1] that an element of the sum is set to 0 while training.
        batch_first: whether inputs are [batch, seq, d_model] rather than [seq, batch, d_model].
        device, dtype: of the table.

    Source: Vaswani et al., "Attention is all you need", section 3.5, https://arxiv.org/abs/1706.03762.
    """

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.batch_first = batch_first
        self.dropout = Dropout(dropout)
        position = torch.arange(max_len, dtype=torch.float64)[:, None]
        angle = position * 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
        table = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :d_model]
        self.register_buffer("table", table.to(device, dtype or torch.get_default_dtype()), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """input: [batch, seq, d_model] or, without batch_first, [seq, batch, d_model]; or [seq, d_model].

        Returns: a tensor of its shape and dtype. Raises: ValueError for a sequence longer than max_len.
        """
        sequence_last = self.batch_first or input.dim() == 2
        seq = input.shape[-2] if sequence_last else input.shape[0]
        if seq > self.table.shape[0]:
            most = f"at most max_len={self.table.shape[0]} long"
            raise ValueError(f"SinusoidalPositionalEncoding: input must be {most}, got {seq}")
        table = self.table[:seq].to(input.dtype)
        return self.dropout(input + (table if sequence_last else table[:, None]))
