"""Which modules of other libraries fastlm.patch swaps, known by their structure: the proof decides."""

from torch import nn

from .. import nn as fastlm_nn
from ..nn._fused import activation_name
from ..nn.rms_norm import epsilon
from ._adapters import BATCH, SEQ, Adapter, call
from ._proof import Trial

_PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}


def _is_norm(module: nn.Module) -> bool:
    """One parameter, a vector called weight, and an eps: what Hugging Face's RMSNorm classes have."""
    alone = module._parameters.keys() == {"weight"} and not module._modules and not module._buffers
    vector = alone and module.weight is not None and module.weight.dim() == 1
    return vector and isinstance(epsilon(module), float)


def _norm_trials(norm, draw):
    return [Trial("rows", call, (draw.normal(BATCH, SEQ, norm.weight.shape[0]),))]


def _is_gated(module: nn.Module) -> bool:
    """Three projections and an act_fn: what Hugging Face's gated MLP classes have."""
    children = dict(module.named_children())
    linear = all(hasattr(children.get(name), "in_features") for name in _PROJECTIONS)
    return linear and not children.keys() - _PROJECTIONS - {"act_fn"} and hasattr(module, "act_fn")


def _gated_why_not(module):
    return (
        None if activation_name(module.act_fn) else "its activation has hooks, or is none that ops.glu knows"
    )


def _gated_trials(module, draw):
    return [Trial("rows", call, (draw.normal(BATCH, SEQ, module.gate_proj.in_features),))]


# Each row: the classes that a module of one structure may get; the first whose proof succeeds it gets.
STRUCTURES: tuple[tuple[Adapter, ...], ...] = (
    (
        Adapter(fastlm_nn.LlamaRMSNorm, _norm_trials, applies=_is_norm),
        Adapter(fastlm_nn.GemmaRMSNorm, _norm_trials, applies=_is_norm),
    ),
    (Adapter(fastlm_nn.GatedFeedForward, _gated_trials, _gated_why_not, applies=_is_gated),),
)
