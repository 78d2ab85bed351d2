"""The public functions, one per op; each also takes `backend=`."""

from ._ops._norms import NormOutput
from ._ops.append_kv import append_kv
from ._ops.attention import AttentionOutput, attention
from ._ops.attention_varlen import attention_varlen
from ._ops.bias_act import bias_act
from ._ops.cross_entropy import cross_entropy
from ._ops.decode_attention import decode_attention
from ._ops.dropout_add import dropout_add
from ._ops.feed_forward import feed_forward
from ._ops.glu import glu
from ._ops.layer_norm import layer_norm
from ._ops.linear_cross_entropy import linear_cross_entropy
from ._ops.rms_norm import rms_norm
from ._ops.rope import rope
from ._ops.softmax import softmax

__all__ = [
    "AttentionOutput",
    "NormOutput",
    "append_kv",
    "attention",
    "attention_varlen",
    "bias_act",
    "cross_entropy",
    "decode_attention",
    "dropout_add",
    "feed_forward",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "softmax",
]
