"""CrossEntropyLoss: torch.nn.CrossEntropyLoss on ops.cross_entropy."""

import torch
from torch import Tensor, nn

from .. import ops
from ._autocast import as_autocast


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross entropy between logits and class indices; constructor of torch.nn.CrossEntropyLoss.

    Class weights and targets that are probabilities are computed by torch. A mean over rows that are all
    ignored is 0 with gradient 0 here, and NaN in torch.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as torch.nn.CrossEntropyLoss.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input: logits [C], [N, C] or [N, C, d1, ...]; target: int64, without C. Returns the loss."""
        classes_last = input.movedim(1, -1) if input.dim() > 1 else input
        indices = target.dtype == torch.int64 and target.shape == classes_last.shape[:-1]
        if self.weight is not None or not indices or input.dim() == 0:
            return super().forward(input, target)
        return ops.cross_entropy(
            as_autocast("cross_entropy", classes_last),
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
