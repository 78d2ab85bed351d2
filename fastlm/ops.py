"""The public functions, one per op; each also takes `backend=`."""

from ._ops.cross_entropy import cross_entropy
from ._ops.dropout_add import dropout_add
from ._ops.layer_norm import NormOutput, layer_norm
from ._ops.softmax import softmax

__all__ = ["NormOutput", "cross_entropy", "dropout_add", "layer_norm", "softmax"]
