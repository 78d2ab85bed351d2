"""fastlm: fused Transformer kernels behind one contract with a plain PyTorch reference."""

from . import cpu, nn, ops
from ._explain import explain
from ._op import use_backend
from .integrations.pytorch import patch, patched

__version__ = "0.1.0"
__all__ = ["cpu", "explain", "nn", "ops", "patch", "patched", "use_backend"]
