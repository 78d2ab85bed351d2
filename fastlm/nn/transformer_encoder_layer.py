"""TransformerEncoderLayer: torch.nn.TransformerEncoderLayer on attention, layer_norm and feed_forward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import _fused
from .layer_norm import LayerNorm
from .multihead_attention import MultiheadAttention


def use_fastlm_parts(layer: nn.Module) -> None:
    """Makes the attentions and norms that a torch constructor gave to `layer` fastlm's."""
    for part in layer.children():
        if type(part) is nn.MultiheadAttention:
            part.__class__ = MultiheadAttention
        elif type(part) is nn.LayerNorm:
            part.__class__ = LayerNorm


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and a feed-forward network; torch's constructor and state_dict.

    Pre-norm: h = x + dropout1(self_attn(norm1(x))), y = h + dropout2(ff(norm2(h))); post-norm:
    h = norm1(x + dropout1(self_attn(x))), y = norm2(h + dropout2(ff(h))). Each dropout, addition and norm
    that follow each other are one op. Outputs at padded positions are unspecified. torch's fast path for
    evaluation is taken for nested tensors only. Activations other than ReLU, GELU and SiLU run through torch.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype: as torch.nn.TransformerEncoderLayer.

    Source: Xiong et al., "On layer normalization in the Transformer architecture", figure 1,
        https://arxiv.org/abs/2002.04745.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = nn.functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        options = dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype
        super().__init__(d_model, nhead, dim_feedforward, *options)
        use_fastlm_parts(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src: [batch, seq, d_model] if batch_first, [seq, batch, d_model] or [seq, d_model].

        Args:
            src: the sequence.
            src_mask: [seq, seq] or [batch * heads, seq, seq], True = exclude, or floats to add.
            src_key_padding_mask: [batch, seq], True = ignore, or floats to add.
            is_causal: says that src_mask is the causal mask; believed, as torch does.

        Returns:
            A tensor of src's shape.
        """
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        x = self.norm1(src) if self.norm_first else src
        attended = self.self_attn(x, x, x, need_weights=False, **masks)[0]
        if not self.norm_first:
            x, _ = _fused.add_norm(attended, src, self.dropout1, self.norm1)
            return _fused.add_norm(self._ff(x), x, self.dropout2, self.norm2).y
        y, h = _fused.add_norm(attended, src, self.dropout1, self.norm2)
        return _fused.add_dropout(self._ff(y), h, self.dropout2)

    def _ff(self, x: Tensor) -> Tensor:
        return _fused.feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)
