"""Steps of a Transformer layer in one op each, where its parts are the plain modules that the op stands for.

A part that has hooks, was replaced, subclassed or parametrised is called as it is, so that what its owner
wanted of it happens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import NormOutput
from ._autocast import as_autocast
from .dropout import Dropout
from .layer_norm import LayerNorm, takes

# Of Hugging Face's transformers, whose models name their activation in a configuration.
_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether `module` is exactly of one of `classes`, and a call does nothing besides its forward."""
    return (
        type(module) in classes
        and "forward" not in module.__dict__
        and not any(getattr(module, h) for h in _HOOKS)
    )


def activation_name(activation: Callable) -> str | None:
    """The op's name of an activation function or module; None if the op has none."""
    if activation is F.relu or activation is torch.relu:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if activation is F.silu:
        return "silu"
    kind = type(activation)
    if not isinstance(activation, nn.Module) or not is_plain(activation, kind):
        return None
    if kind.__module__ == "transformers.activations":
        return _TRANSFORMERS.get(kind.__name__)
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[activation.approximate]
    if kind is nn.ReLU:
        return "relu"
    return "silu" if kind is nn.SiLU else None


def _drop_p(dropout: nn.Module) -> float | None:
    """The probability that a plain dropout applies now; None if it must be called."""
    if not is_plain(dropout, nn.Dropout, Dropout):
        return None
    p = dropout.p if dropout.training else 0.0
    return p if p < 1.0 else None


def _one_dtype(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that their sum has in torch."""
    if x.dtype == residual.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def add_norm(x: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module) -> NormOutput:
    """(norm(h), h), h = dropout(x) + residual, in one op where both modules are plain."""
    p = _drop_p(dropout)
    wide, beside = (as_autocast("layer_norm", t) for t in _one_dtype(x, residual))
    plain = p is not None and is_plain(norm, nn.LayerNorm, LayerNorm)
    if not plain or len(norm.normalized_shape) > 1 or not takes(norm, wide):
        h = residual + dropout(x)
        return NormOutput(norm(h), h)
    return ops.layer_norm(wide, norm.weight, norm.bias, norm.eps, residual=beside, dropout_p=p)


def add_dropout(x: Tensor, residual: Tensor, dropout: nn.Module) -> Tensor:
    """residual + dropout(x), in one op where the dropout is plain."""
    p = _drop_p(dropout)
    if p is None:
        return residual + dropout(x)
    return ops.dropout_add(*_one_dtype(x, residual), dropout_p=p)


def feed_forward(
    x: Tensor, linear1: nn.Module, activation: Callable, dropout: nn.Module, linear2: nn.Module
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), in one op where all four are plain."""
    p, name = _drop_p(dropout), activation_name(activation)
    linear = is_plain(linear1, nn.Linear) and is_plain(linear2, nn.Linear)
    if p is None or name is None or not linear:
        return linear2(dropout(activation(linear1(x))))
    weights = linear1.weight, linear1.bias, linear2.weight, linear2.bias
    return ops.feed_forward(x, *weights, name, dropout_p=p)


def gate(gate: Tensor, activation: Callable, up: Tensor) -> Tensor:
    """activation(gate) * up, in one op where the activation is plain and the two are alike."""
    name = activation_name(activation)
    if name is None or gate.is_nested or gate.dtype != up.dtype or gate.shape != up.shape:
        return activation(gate) * up
    return ops.glu(gate, up, name)
