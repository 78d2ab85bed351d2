"""fastlm: fused Transformer kernels behind one contract with a plain PyTorch reference."""

from . import ops
from ._explain import explain
from ._op import use_backend

__version__ = "0.1.0"
__all__ = ["explain", "ops", "use_backend"]
