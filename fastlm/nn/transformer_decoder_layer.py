"""TransformerDecoderLayer: torch.nn.TransformerDecoderLayer on attention, layer_norm and feed_forward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import _fused
from .transformer_encoder_layer import use_fastlm_parts


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention, cross-attention and a feed-forward network; torch's constructor and state_dict.

    Pre-norm: a = x + dropout1(self_attn(norm1(x))), b = a + dropout2(multihead_attn(norm2(a), memory)),
    y = b + dropout3(ff(norm3(b))); post-norm applies each norm after the addition. Each dropout, addition and
    norm that follow each other are one op.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype: as torch.nn.TransformerDecoderLayer.

    Source: Vaswani et al., "Attention is all you need", https://arxiv.org/abs/1706.03762.
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
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt, memory: [batch, seq, d_model] if batch_first, [seq, batch, d_model] or [seq, d_model].

        Args:
            tgt: the sequence; memory: the encoder's output.
            tgt_mask: [seq, seq] or [batch * heads, seq, seq], True = exclude, or floats to add.
            memory_mask: [seq, memory's seq] or with batch * heads in front.
            tgt_key_padding_mask, memory_key_padding_mask: [batch, keys], True = ignore, or floats to add.
            tgt_is_causal, memory_is_causal: say that the mask is the causal one; believed, as torch does.

        Returns:
            A tensor of tgt's shape.
        """
        masks = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        across = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask}
        across["is_causal"] = memory_is_causal
        x = self.norm1(tgt) if self.norm_first else tgt
        attended = self.self_attn(x, x, x, need_weights=False, **masks)[0]
        if not self.norm_first:
            a, _ = _fused.add_norm(attended, tgt, self.dropout1, self.norm1)
            b, _ = _fused.add_norm(self._across(a, memory, across), a, self.dropout2, self.norm2)
            return _fused.add_norm(self._ff(b), b, self.dropout3, self.norm3).y
        y, a = _fused.add_norm(attended, tgt, self.dropout1, self.norm2)
        y, b = _fused.add_norm(self._across(y, memory, across), a, self.dropout2, self.norm3)
        return _fused.add_dropout(self._ff(y), b, self.dropout3)

    def _across(self, x: Tensor, memory: Tensor, masks: dict) -> Tensor:
        return self.multihead_attn(x, memory, memory, need_weights=False, **masks)[0]

    def _ff(self, x: Tensor) -> Tensor:
        return _fused.feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)
