"""The public functions, one per op; each also takes `backend=`."""

from ._ops.attention import AttentionOutput, attention
from ._ops.dropout_add import dropout_add
from ._ops.layer_norm import NormOutput, layer_norm

__all__ = ["AttentionOutput", "NormOutput", "attention", "dropout_add", "layer_norm"]
