"""LinearCrossEntropyLoss: the head of a language model and its loss on ops.linear_cross_entropy."""

from typing import Literal

from torch import Tensor, nn

from .. import ops


class LinearCrossEntropyLoss(nn.Module):
    """Cross entropy of the logits input @ weight.T + bias, which are never there as a whole.

    In place of `loss(lm_head(x), target)` write `loss(x, lm_head.weight, target, lm_head.bias)`. It has no
    parameters: the weight stays where it is, in a head or tied to an embedding, and in its state_dict.
    Computes what torch.nn.CrossEntropyLoss does of nn.Linear's output, classes last, also under autocast; a
    mean over rows that are all ignored is 0 with gradient 0, and NaN in torch.

    Args:
        ignore_index: target of rows that count for nothing.
        label_smoothing: share in [0, 1] of the target that is spread evenly over all classes.
        z_loss: weight, 0 or more, of the square of the logits' log-sum-exp.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".

    Source: Hsu et al., "Liger Kernel", https://arxiv.org/abs/2410.10989, section 3.2.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: Literal["none", "sum", "mean"] = "mean",
    ):
        super().__init__()
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.z_loss, self.reduction = z_loss, reduction

    def forward(self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns the loss.

        input: [..., in]; weight: [classes, in] and bias: [classes], as of nn.Linear; target: int64 [...].
        """
        return ops.linear_cross_entropy(
            input,
            weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options, for print."""
        names = "ignore_index", "label_smoothing", "z_loss", "reduction"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
