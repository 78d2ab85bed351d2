"""The public functions, one per op; each also takes `backend=`."""

from ._ops.bias_act import bias_act
from ._ops.dropout_add import dropout_add
from ._ops.feed_forward import feed_forward
from ._ops.layer_norm import NormOutput, layer_norm

__all__ = ["NormOutput", "bias_act", "dropout_add", "feed_forward", "layer_norm"]
