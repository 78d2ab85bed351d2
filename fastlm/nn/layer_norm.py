"""LayerNorm: torch.nn.LayerNorm on ops.layer_norm."""

import torch
from torch import Tensor, nn

from .. import ops
from ._autocast import as_autocast


def takes(norm: nn.LayerNorm, x: Tensor) -> bool:
    """Whether ops.layer_norm takes x and the parameters of `norm`."""
    shape, parameters = norm.normalized_shape, [p for p in (norm.weight, norm.bias) if p is not None]
    dtypes = all(p.dtype in (x.dtype, torch.float32) for p in parameters)
    return dtypes and not x.is_nested and 0 not in shape and x.shape[-len(shape) :] == shape


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last axes; constructor and state_dict of torch.nn.LayerNorm.

    y = (x - mean) / sqrt(variance + eps) * weight + bias over the axes of `normalized_shape`.

    Args:
        normalized_shape: the sizes of the last axes, together one row; eps: added to the variance.
        elementwise_affine: learn a weight; bias: learn a bias beside it; device, dtype: of both.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., *normalized_shape]; returns a tensor like it."""
        input, shape = as_autocast("layer_norm", input), self.normalized_shape
        if not takes(self, input):
            return super().forward(input)  # torch has the rule, or the words for the error
        if len(shape) == 1:
            return ops.layer_norm(input, self.weight, self.bias, self.eps)
        weight, bias = (p if p is None else p.flatten() for p in (self.weight, self.bias))
        rows = input.flatten(-len(shape))
        return ops.layer_norm(rows, weight, bias, self.eps).view(input.shape)
