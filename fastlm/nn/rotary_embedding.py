"""RotaryEmbedding: turns queries and keys by the angles of their positions, on ops.rope."""

import torch
from torch import Tensor, nn

from .. import ops


class RotaryEmbedding(nn.Module):
    """Rotary position embedding: pair i of an element at position p is turned by p * base^(-2i / dim).

    cos and sin are tables in float32 (float64 in a float64 module), whatever half precision the module is
    cast to. The state_dict leaves them out.

    Args:
        dim: how many elements of a head are rotated, even; the others are passed through.
        max_positions: how many positions the tables hold.
        base: of the angles, 10000 for Llama, 500000 for Llama 3.
        interleaved: pairs are neighbours rather than element i and element i + dim / 2.
        device: of the tables.

    Raises:
        ValueError: dim is odd or not positive.

    Source: Su et al., "RoFormer", https://arxiv.org/abs/2104.09864.
    """

    def __init__(
        self,
        dim: int,
        max_positions: int = 2048,
        base: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even and positive, got {dim}")
        self.dim, self.max_positions, self.base, self.interleaved = dim, max_positions, base, interleaved
        self._make_tables(
            torch.device(device) if device is not None else torch.get_default_device(), torch.float32
        )

    def _make_tables(self, device: torch.device, dtype: torch.dtype) -> None:
        position = torch.arange(self.max_positions, dtype=torch.float64, device=device)
        pair = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device)
        angles = torch.outer(position, self.base ** (-pair / self.dim)).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def _apply(self, fn, recurse=True):
        """What to(), half() and to_empty() call: tables are made anew, never rounded and never empty."""
        super()._apply(fn, recurse)
        wide = self.cos.dtype == torch.float64
        self._make_tables(self.cos.device, torch.float64 if wide else torch.float32)
        return self

    def forward(
        self, q: Tensor, k: Tensor, *, offset: int = 0, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Turns q [batch, heads, seq, head_dim] and k [batch, kv_heads, seq, head_dim].

        offset: the first token's position: how many tokens came before. position_ids: each token's position,
        int64 [seq] or [batch, seq], instead of an offset.

        Returns: (q, k) turned, each like it was. Raises: ValueError for positions that the tables do not hold
        (IndexError for such position_ids), and for an offset beside position_ids.
        """
        cos, sin = self._tables(q.shape[-2], offset, position_ids)
        return tuple(ops.rope(x, cos, sin, interleaved=self.interleaved) for x in (q, k))

    def _tables(self, seq: int, offset: int, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        if position_ids is not None:
            if offset != 0:
                raise ValueError(f"RotaryEmbedding: offset must be 0 beside position_ids, got {offset}")
            return self.cos[position_ids], self.sin[position_ids]
        if offset < 0 or offset + seq > self.max_positions:
            within = f"in [0, max_positions={self.max_positions})"
            found = f"{offset} to {offset + seq - 1}"
            raise ValueError(f"RotaryEmbedding: positions must lie {within}, got {found}")
        return self.cos[offset : offset + seq], self.sin[offset : offset + seq]

    def extra_repr(self) -> str:
        """What print shows between the brackets."""
        return f"dim={self.dim}, max_positions={self.max_positions}, base={self.base:g}"
