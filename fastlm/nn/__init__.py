"""Modules whose forward calls a fastlm op, as subclasses of their torch.nn twins."""

from .cross_entropy_loss import CrossEntropyLoss
from .dropout import Dropout
from .feed_forward import FeedForward
from .gated_feed_forward import GatedFeedForward
from .layer_norm import LayerNorm
from .linear_cross_entropy_loss import LinearCrossEntropyLoss
from .multihead_attention import MultiheadAttention
from .rms_norm import GemmaRMSNorm, LlamaRMSNorm, RMSNorm
from .rotary_embedding import RotaryEmbedding
from .sequential import Sequential
from .sinusoidal_positional_encoding import SinusoidalPositionalEncoding
from .softmax import Softmax
from .transformer_decoder_layer import TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder
from .transformer_encoder_layer import TransformerEncoderLayer

__all__ = [
    "CrossEntropyLoss",
    "Dropout",
    "FeedForward",
    "GatedFeedForward",
    "GemmaRMSNorm",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LlamaRMSNorm",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "Sequential",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
