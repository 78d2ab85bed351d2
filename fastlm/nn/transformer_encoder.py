"""TransformerEncoder: torch.nn.TransformerEncoder without nested tensors."""

import torch.nn.functional as F
from torch import Tensor, nn

from . import _masks
from .transformer_encoder_layer import TransformerEncoderLayer


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of encoder layers and an optional norm; torch's constructor and state_dict.

    Padding is never cut off: outputs have src's shape, and are unspecified at padded positions.

    Args:
        encoder_layer: the layer that is copied; num_layers: how often; norm: applied last, or None.
        enable_nested_tensor, mask_check: accepted as torch does, without effect.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ):
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """src: [batch, seq, d_model] if the layers are batch_first, [seq, batch, d_model] or [seq, d_model].

        Args:
            src: the sequence.
            mask: [seq, seq] or [batch * heads, seq, seq], True = exclude, or floats to add.
            src_key_padding_mask: [batch, seq], True = ignore, or floats to add.
            is_causal: says that mask is the causal mask, believed, as torch does; None: look at the values.

        Returns:
            A tensor of src's shape.
        """
        is_causal = _masks.is_causal(mask, is_causal)
        if not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            names = (mask, "mask"), (src_key_padding_mask, "src_key_padding_mask")
            mask, src_key_padding_mask = (_added(m, name, src) for m, name in names)
        masks = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        for layer in self.layers:
            src = layer(src, **masks)
        return src if self.norm is None else self.norm(src)


def _added(mask: Tensor | None, name: str, src: Tensor) -> Tensor | None:
    """A mask as torch hands it to layers that are not fastlm's: floats to add."""
    return F._canonical_mask(mask, name, None, "", src.dtype, check_other=False)
