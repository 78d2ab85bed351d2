"""RMSNorm: torch.nn.RMSNorm on ops.rms_norm; LlamaRMSNorm and GemmaRMSNorm, as Hugging Face writes it."""

import torch
from torch import Tensor, nn

from .. import ops


def _takes(norm: nn.RMSNorm, x: Tensor) -> bool:
    """Whether ops.rms_norm takes x and the weight of `norm`."""
    shape = norm.normalized_shape
    fits = norm.weight is None or norm.weight.dtype in (x.dtype, torch.float32)
    return fits and not x.is_nested and 0 not in shape and x.shape[-len(shape) :] == shape


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over the last axes; constructor and state_dict of torch.nn.RMSNorm.

    y = x / sqrt(mean(x^2) + eps) * weight over the axes of `normalized_shape`.

    Args:
        normalized_shape: the sizes of the last axes, together one row; eps: added to the mean square; None is
            torch's own default: the eps of the dtype that it computes in, float32 for half precision.
        elementwise_affine: learn a weight; device, dtype: of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., *normalized_shape]; returns a tensor like it."""
        shape, weight = self.normalized_shape, self.weight
        if not _takes(self, x):
            return super().forward(x)  # torch has the rule, or the words for the error
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        if len(shape) == 1:
            return ops.rms_norm(x, weight, eps)
        weight = None if weight is None else weight.flatten()
        return ops.rms_norm(x.flatten(-len(shape)), weight, eps).view(x.shape)


class LlamaRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, in the wider of x's and the weight's dtype.

    What `fastlm.patch` makes of the RMSNorm of Hugging Face's Llama, Mistral, Qwen and T5 models: one
    parameter `weight`, and `variance_epsilon` or `eps`.

    Args:
        hidden_size: size of the last axis; eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [..., hidden_size]; returns a tensor of its shape."""
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
        return ops.rms_norm(x, _weight(self, x), epsilon(self))


class GemmaRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight) over the last axis, in x's dtype.

    What `fastlm.patch` makes of the RMSNorm of Hugging Face's Gemma models: one parameter `weight`, its
    distance from 1, and `eps` or `variance_epsilon`.

    Args:
        hidden_size: size of the last axis; eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; returns a tensor like it."""
        return ops.rms_norm(x, _weight(self, x), epsilon(self), weight_offset=1.0)


def _weight(norm: nn.Module, x: Tensor) -> Tensor:
    """The weight in a dtype that ops.rms_norm takes beside x."""
    return norm.weight if norm.weight.dtype in (x.dtype, torch.float32) else norm.weight.to(x.dtype)


def epsilon(norm: nn.Module) -> float | None:
    """The eps of a norm by one of the names that models give it; None if it has none."""
    eps = getattr(norm, "variance_epsilon", None)
    return getattr(norm, "eps", None) if eps is None else eps
