"""What else computes an op on a GPU: FlexAttention, FlashAttention-2, Liger-Kernel, as sides beside torch's.

FlashAttention-2 twice: the package flash-attn, where it is installed, and torch's own build of it, which SDPA
takes only where cuDNN's kernels do not.

Each peer gets its inputs in the layout that it wants, made before the timing. Those that write into their
inputs (Liger-Kernel's losses put gradients there) get copies of their own.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from .workload import Baseline

PEERS = ("flex", "sdpa_flash", "flash_attn", "liger")
PACKAGES = {"flash_attn": ("flash_attn", "flash-attn"), "liger": ("liger_kernel", "liger-kernel")}


def missing(name: str) -> str | None:
    """None if the peer's package is installed, or it needs none, else what to install."""
    module, package = PACKAGES.get(name, (None, None))
    if module is None or find_spec(module) is not None:
        return None
    return f"needs {module}: pip install {package}"


def of(op: str, workload: str) -> dict[str, Callable[[], Baseline]]:
    """Peer -> what makes its call, for a workload of an op; what makes it imports the peer's package."""
    return _PEERS.get((op, workload), {})


def _heads_after_tokens(arguments: dict, t: Tensor) -> Tensor:
    """[B,H,S,D] -> [B,S,H,D], or back."""
    return t.transpose(1, 2).contiguous()


def _tokens_first(arguments: dict) -> dict:
    return arguments | {n: _heads_after_tokens(arguments, arguments[n]) for n in "qkv"}


def _copies(arguments: dict) -> dict:
    return {n: t.clone() if isinstance(t, Tensor) else t for n, t in arguments.items()}


def _flex(mask_of: Callable[[dict], Callable | None], given=dict, form=None, unform=None) -> Baseline:
    """FlexAttention, compiled; its block mask, which a model makes once for all layers, is made before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def prepared(arguments: dict) -> dict:
        made, mask = given(arguments), mask_of(arguments)
        made = {n: made[n] for n in "qkv"}
        if mask is None:
            return made | {"block_mask": None}
        batch = made["q"].shape[0] if "kv_lengths" in arguments else None
        sizes = (made["q"].shape[2], made["k"].shape[2])
        return made | {"block_mask": create_block_mask(mask, batch, None, *sizes, device=made["q"].device)}

    def call(q, k, v, block_mask):
        return compiled(q, k, v, block_mask=block_mask)

    made = Baseline(call, prepared)
    return made if form is None else Baseline(call, prepared, form, unform)


def _causal(arguments: dict) -> Callable:
    return lambda b, h, q, k: q >= k


def _within_lengths(arguments: dict) -> Callable:
    lengths = arguments["kv_lengths"]
    return lambda b, h, q, k: k < lengths[b]


def _same_sequence(arguments: dict) -> Callable:
    starts = arguments["cu_seqlens_q"]
    tokens = torch.arange(arguments["q"].shape[0], device=starts.device)
    owner = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
    return lambda b, h, q, k: owner[q] == owner[k]


def _one_batch(arguments: dict, packed: Tensor) -> Tensor:
    """[tokens, heads, dim] -> [1, heads, tokens, dim]."""
    return packed.transpose(0, 1)[None].contiguous()


def _packed_again(arguments: dict, t: Tensor) -> Tensor:
    return t[0].transpose(0, 1)


def _flex_packed() -> Baseline:
    def given(arguments: dict) -> dict:
        return {n: _one_batch(arguments, arguments[n]) for n in "qkv"}

    return _flex(_same_sequence, given, _one_batch, _packed_again)


def _whole_caches(arguments: dict) -> dict:
    """All caches are full: no mask is needed."""
    return {"q": arguments["q"], "k": arguments["k_cache"], "v": arguments["v_cache"]}


def _flex_cached() -> Baseline:
    return _flex(lambda arguments: None, _whole_caches)


def _sdpa_flash(given=dict) -> Baseline:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call(q, k, v, causal=False, dropout_p=0.0):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal)

    return Baseline(call, given)


def _flash_attention() -> Baseline:
    from flash_attn import flash_attn_func

    def call(q, k, v, causal, dropout_p):
        return flash_attn_func(q, k, v, dropout_p=dropout_p, causal=causal)

    return Baseline(call, _tokens_first, _heads_after_tokens, _heads_after_tokens)


def _flash_varlen() -> Baseline:
    from flash_attn import flash_attn_varlen_func

    def call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k):
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)

    return Baseline(call)


def _flash_cached() -> Baseline:
    from flash_attn import flash_attn_with_kvcache

    def given(arguments: dict) -> dict:
        names = ("q", "k_cache", "v_cache")
        return arguments | {n: _heads_after_tokens(arguments, arguments[n]) for n in names}

    def call(q, k_cache, v_cache, kv_lengths):
        return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=kv_lengths, causal=True)

    return Baseline(call, given, _heads_after_tokens, _heads_after_tokens)


def _flash_rope() -> Baseline:
    from flash_attn.layers.rotary import apply_rotary_emb

    def given(arguments: dict) -> dict:
        half = arguments["cos"].shape[-1] // 2
        tables = {n: arguments[n][..., :half].contiguous() for n in ("cos", "sin")}
        return tables | {"x": _heads_after_tokens(arguments, arguments["x"])}

    def call(x, cos, sin):
        return apply_rotary_emb(x, cos, sin)

    return Baseline(call, given, _heads_after_tokens, _heads_after_tokens)


def _liger(name: str, *order: str, **options) -> Baseline:
    """liger_kernel's function liger_<name>, given the arguments `order` by position and its own options."""
    from liger_kernel.transformers import functional

    function = getattr(functional, f"liger_{name}")

    def call(**arguments):
        return function(*(arguments[n] for n in order), **options)

    return Baseline(call, _copies)


_DENSE = {"sdpa_flash": _sdpa_flash, "flash_attn": _flash_attention}
_PEERS: dict[tuple[str, str], dict[str, Callable[[], Baseline]]] = {
    ("attention", "gpt2_causal"): {"flex": partial(_flex, _causal), **_DENSE},
    ("attention", "long_causal"): {"flex": partial(_flex, _causal), **_DENSE},
    ("attention", "causal_dropout"): _DENSE,  # FlexAttention has no dropout
    ("attention", "half_lengths"): {"flex": partial(_flex, _within_lengths)},
    ("attention_varlen", "16_to_256_tokens"): {"flex": _flex_packed, "flash_attn": _flash_varlen},
    ("decode_attention", "cached"): {
        "flex": _flex_cached,
        "sdpa_flash": partial(_sdpa_flash, _whole_caches),
        "flash_attn": _flash_cached,
    },
    ("rope", "tinyllama"): {"flash_attn": _flash_rope},
    ("layer_norm", "gpt2"): {"liger": partial(_liger, "layer_norm", "x", "weight", "bias", eps=1e-5)},
    # in_place would overwrite the gradient that all rounds share
    ("rms_norm", "tinyllama"): {
        "liger": partial(_liger, "rms_norm", "x", "weight", eps=1e-6, in_place=False)
    },
    ("glu", "tinyllama_silu"): {"liger": partial(_liger, "swiglu", "gate", "up")},
    ("cross_entropy", "small_vocabulary"): {"liger": partial(_liger, "cross_entropy", "logits", "target")},
    ("linear_cross_entropy", "gpt2"): {
        "liger": partial(_liger, "fused_linear_cross_entropy", "x", "weight", "target")
    },
}
