"""Dropout: torch.nn.Dropout on ops.dropout_add."""

from torch import Tensor, nn

from .. import ops


class Dropout(nn.Dropout):
    """Sets elements to 0 with probability p while training, and scales the others by 1 / (1 - p).

    The masks come from Philox with a seed drawn from torch's generator: torch.manual_seed repeats them, but
    they are other masks than torch.nn.Dropout's.

    Args:
        p: probability in [0, 1]; inplace: overwrite the input (done by torch, for a fastlm op never writes
            to its inputs).
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape; returns a tensor like it, or the input itself where nothing is dropped."""
        if self.inplace or self.p == 1.0 or input.is_nested:
            return super().forward(input)
        if not self.training or self.p == 0.0:
            return input
        return ops.dropout_add(input, dropout_p=self.p)
