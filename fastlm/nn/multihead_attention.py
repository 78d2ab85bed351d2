"""MultiheadAttention: torch.nn.MultiheadAttention on ops.attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from . import _masks


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention; constructor and state_dict of torch.nn.MultiheadAttention.

    need_weights, bias_k and bias_v, add_zero_attn and nested tensors are computed by torch, and wrong
    shapes are refused in torch's words. A mask that is exactly causal costs nothing: the excluded tiles are
    skipped. A query with nothing to attend to gives the bias of out_proj, never NaN.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as torch.nn.MultiheadAttention.

    Source: Vaswani et al., "Attention is all you need", https://arxiv.org/abs/1706.03762.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to keys and values; [batch, seq, dim] if batch_first, [seq, batch, dim], or [seq, dim].

        Args:
            query, key, value: where they are one tensor, one projection makes all three.
            key_padding_mask: [batch, keys] ([keys] for [seq, dim] inputs), True = ignore, or floats to add.
            need_weights: also return the attention weights; slower, as they are then stored.
            attn_mask: [queries, keys] or [batch * heads, queries, keys], True = exclude, or floats to add.
            average_attn_weights: whether the weights returned are a mean over the heads.
            is_causal: says that attn_mask is the causal mask; believed, as torch does.

        Returns:
            (output like query, weights or None).
        """
        masks = key_padding_mask, attn_mask
        if need_weights or not self._fits(query, key, value, *masks) or (is_causal and attn_mask is None):
            options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return super().forward(query, key, value, *options)
        q, k, v = (self._heads(t, query.dim()) for t in self._projections(query, key, value))
        padding = key_padding_mask if query.dim() == 3 or key_padding_mask is None else key_padding_mask[None]
        if (padding is None or q.shape[2] == k.shape[2]) and _masks.is_causal(attn_mask, is_causal):
            causal, attn_mask = "top_left", None
        else:
            causal = False
        given = _masks.attention_arguments(attn_mask, padding, q.shape[0], q.dtype)
        out = ops.attention(q, k, v, causal=causal, dropout_p=self.dropout if self.training else 0.0, **given)
        out = out.transpose(1, 2) if self.batch_first or query.dim() == 2 else out.permute(2, 0, 1, 3)
        out = out.reshape(*query.shape[:-1], self.embed_dim)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None

    def _fits(self, query, key, value, padding, attn_mask) -> bool:
        """Whether the kernel has all that this call asks for; else torch runs it, or refuses it."""
        inputs = query, key, value
        if any(t.is_nested or t.dim() != query.dim() for t in inputs) or query.dim() not in (2, 3):
            return False
        if self.bias_k is not None or self.add_zero_attn or (self.training and self.dropout >= 1.0):
            return False
        if query.dim() == 2:
            query, key, value = (t[None] for t in inputs)
            padding = None if padding is None else padding[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in inputs)
        (batch, queries, size), keys = query.shape, key.shape[1]
        shapes = size == self.embed_dim and key.shape == (batch, keys, self.kdim)
        masks = _masks.fits(attn_mask, padding, batch, self.num_heads, queries, keys)
        return shapes and masks and value.shape == (batch, keys, self.vdim)

    def _projections(self, query, key, value):
        """(q, k, v), each [..., embed_dim]; slices of one projection where the inputs are one tensor."""
        size, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif key is value:
            both = F.linear(key, weight[size:], None if bias is None else bias[size:])
            return F.linear(query, weight[:size], biases[0]), *both.chunk(2, -1)
        else:
            weights = weight.chunk(3)
        return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor, dims: int) -> Tensor:
        """A projection, laid out as the inputs are, as [batch, heads, seq, dim]."""
        x = (x[None] if dims == 2 else x).unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if self.batch_first or dims == 2 else x.permute(1, 2, 0, 3)
