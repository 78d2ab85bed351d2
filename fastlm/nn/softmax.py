"""Softmax: torch.nn.Softmax on ops.softmax."""

from torch import Tensor, nn

from .. import ops
from ._autocast import as_autocast


class Softmax(nn.Softmax):
    """exp(x) / sum(exp(x)) over one axis; constructor of torch.nn.Softmax.

    Args:
        dim: the axis that sums to 1; None lets torch choose, with its warning.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape; returns a tensor like it."""
        if self.dim is None or input.dim() == 0 or input.is_nested:
            return super().forward(input)
        input = as_autocast("softmax", input)
        if self.dim in (-1, input.dim() - 1):
            return ops.softmax(input)
        return ops.softmax(input.movedim(self.dim, -1)).movedim(-1, self.dim)
