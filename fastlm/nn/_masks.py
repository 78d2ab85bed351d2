"""The masks of torch.nn's attention modules as the arguments of ops.attention.

torch.nn: boolean masks where True = excluded, floating masks that are added. ops.attention: mask where True =
attend, bias that is added.
"""

import torch
from torch import Tensor

from .._ops._check import has_values


def is_causal(mask: Tensor | None, hint: bool | None = None) -> bool:
    """Whether a torch.nn attention mask [seq, seq] excludes exactly the keys after each query.

    hint: True is believed, as torch does. Values are read on the CPU outside compilation only: elsewhere
    reading them would wait for the device, and the mask works as it is.
    """
    if hint or mask is None:
        return bool(hint)
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.requires_grad or not has_values(mask):
        return False
    later = torch.ones(mask.shape, dtype=torch.bool).triu(1)
    if mask.dtype is torch.bool:
        return torch.equal(mask, later)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill_(later, -torch.inf))


def fits(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, queries: int, keys: int
) -> bool:
    """Whether both masks have a shape and a dtype that torch.nn documents."""
    for mask in (attn_mask, padding):
        if mask is not None and mask.dtype is not torch.bool and not mask.is_floating_point():
            return False
    if padding is not None and padding.shape != (batch, keys):
        return False
    return attn_mask is None or attn_mask.shape in ((queries, keys), (batch * heads, queries, keys))


def attention_arguments(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype
) -> dict:
    """{"mask": ..., "bias": ...} of ops.attention for queries of `dtype`, each a tensor or None.

    attn_mask: [queries, keys] or [batch * heads, queries, keys]; padding: [batch, keys].
    """
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (batch, -1))
    if padding is not None:
        padding = padding[:, None, None, :]
    masks = [m for m in (attn_mask, padding) if m is not None]
    excluded = [m for m in masks if m.dtype is torch.bool]
    added = [
        m if m.dtype in (dtype, torch.float32) else m.to(dtype) for m in masks if m.dtype is not torch.bool
    ]
    return {
        "mask": ~(excluded[0] if len(excluded) == 1 else excluded[0] | excluded[1]) if excluded else None,
        "bias": added[0] if len(added) == 1 else added[0] + added[1] if added else None,
    }
