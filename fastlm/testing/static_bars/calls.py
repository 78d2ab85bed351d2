"""The calls whose kernels are looked at: every op at sizes of real models, and past one tile.

Tensors are as torch.empty leaves them: what no kernel reads costs no memory, however large.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {F32: "f32", F16: "f16", BF16: "bf16"}
_ALL, _HALVES, _TWO, _ONE = (F32, F16, BF16), (F16, BF16), (F32, BF16), (BF16,)
_ROWS = 4096


@dataclass(frozen=True)
class Call:
    """inputs: dtype -> the public function's arguments by name."""

    op: str
    case: str
    dtype: torch.dtype
    inputs: Callable[[torch.dtype], dict]

    def __str__(self) -> str:
        return f"{self.op} {self.case} {DTYPES[self.dtype]}"


def landed(op: str) -> bool:
    """Whether the op has a Triton kernel."""
    return importlib.util.find_spec(f"fastlm_triton.{op}") is not None


def calls_of(op: str, backend: str = "triton") -> list[Call]:
    """All calls of one op."""
    calls = _BESIDE_TORCH[op] if backend == "cuda" and op in _BESIDE_TORCH else _CALLS[op]
    return [Call(op, case, dtype, inputs) for case, dtypes, inputs in calls for dtype in dtypes]


def _norm(cols, op="layer_norm", residual=False, **options):
    def inputs(dtype):
        made = {"x": torch.empty(_ROWS, cols, dtype=dtype), "weight": torch.empty(cols, dtype=dtype)}
        if op == "layer_norm":
            made["bias"] = torch.empty(cols, dtype=dtype)
        if residual:
            made["residual"] = torch.empty(_ROWS, cols, dtype=dtype)
        return made | options

    return inputs


def _norms(op):
    return [
        ("768", _ALL, _norm(768, op)),
        ("4096", _ALL, _norm(4096, op)),
        ("8192", _TWO, _norm(8192, op)),
        ("32768", _TWO, _norm(32768, op)),
        ("768+residual+dropout", _ONE, _norm(768, op, True, dropout_p=0.1, seed=1)),
        ("4096+residual", _TWO, _norm(4096, op, True)),
        ("4096+residual+dropout", _TWO, _norm(4096, op, True, dropout_p=0.1, seed=1)),
        ("8192+residual+dropout", _TWO, _norm(8192, op, True, dropout_p=0.1, seed=1)),
    ]


def _softmax(*shape, mask=None, **options):
    def inputs(dtype):
        masks = {} if mask is None else {"mask": torch.empty(mask, dtype=torch.bool)}
        return {"x": torch.empty(shape, dtype=dtype)} | masks | options

    return inputs


def _elementwise(cols, names, **options):
    return lambda dtype: {name: torch.empty(_ROWS, cols, dtype=dtype) for name in names} | options


def _bias_act(cols, activation, **options):
    return lambda dtype: (
        {
            "x": torch.empty(_ROWS, cols, dtype=dtype),
            "bias": torch.empty(cols, dtype=dtype),
            "activation": activation,
        }
        | options
    )


def _rope(heads, dim, rotated=None, **options):
    def inputs(dtype):
        table = torch.empty(2048, rotated or dim, dtype=dtype)
        return {"x": _heads(2, 2048, heads, dim, dtype), "cos": table, "sin": table} | options

    return inputs


def _heads(batch, seq, heads, dim, dtype):
    """[batch, heads, seq, dim] as a projection leaves it."""
    return torch.empty(batch, seq, heads, dim, dtype=dtype).transpose(1, 2)


def _cross_entropy(classes, **options):
    return lambda dtype: (
        {
            "logits": torch.empty(_ROWS, classes, dtype=dtype),
            "target": torch.zeros(_ROWS, dtype=torch.int64),
        }
        | options
    )


def _linear_cross_entropy(dim, classes, bias=False, **options):
    """Few tokens: the products of matrices are torch's, which runs them."""

    def inputs(dtype):
        made = {"x": torch.empty(16, dim, dtype=dtype), "weight": torch.empty(classes, dim, dtype=dtype)}
        if bias:
            made["bias"] = torch.empty(classes, dtype=dtype)
        return made | {"target": torch.zeros(16, dtype=torch.int64)} | options

    return inputs


def _feed_forward(tokens, dim, hidden, activation="gelu", **options):
    def inputs(dtype):
        made = {"x": torch.empty(tokens, dim, dtype=dtype), "w1": torch.empty(hidden, dim, dtype=dtype)}
        made |= {"b1": torch.empty(hidden, dtype=dtype), "w2": torch.empty(dim, hidden, dtype=dtype)}
        return made | {"b2": torch.empty(dim, dtype=dtype), "activation": activation} | options

    return inputs


def _attention(
    heads, dim, kv_heads=None, seq=2048, bias=False, mask=False, lengths=False, alibi=False, **options
):
    def inputs(dtype):
        made = {n: _heads(2, seq, kv_heads or heads, dim, dtype) for n in "kv"}
        made["q"] = _heads(2, seq, heads, dim, dtype)
        if bias:
            made["bias"] = torch.empty(1, heads, seq, seq, dtype=dtype)
        if mask:
            made["mask"] = torch.empty(2, 1, 1, seq, dtype=torch.bool)
        if lengths:
            made["kv_lengths"] = torch.zeros(2, dtype=torch.int32)
        if alibi:
            made["alibi_slopes"] = torch.empty(heads)
        return made | options

    return inputs


def _varlen(heads, dim, kv_heads=None, **options):
    def inputs(dtype):
        starts = torch.tensor([0, 1024, 4096], dtype=torch.int32)
        made = {n: torch.empty(4096, kv_heads or heads, dim, dtype=dtype) for n in "kv"}
        made |= {
            "q": torch.empty(4096, heads, dim, dtype=dtype),
            "cu_seqlens_q": starts,
            "cu_seqlens_k": starts,
        }
        return made | {"max_q": 3072, "max_k": 3072} | options

    return inputs


def _cache(kv_heads, dim, dtype, paged=False, int8=False):
    """The arguments that name a cache of 8 sequences and 4096 tokens each."""
    lead = (2048, kv_heads, 16) if paged else (8, kv_heads, 4096)
    made = {n: torch.empty(*lead, dim, dtype=torch.int8 if int8 else dtype) for n in ("k_cache", "v_cache")}
    if int8:
        made |= {n: torch.empty(*lead) for n in ("k_scale", "v_scale")}
    if paged:
        made["block_table"] = torch.zeros(8, 256, dtype=torch.int32)
    return made | {"kv_lengths": torch.ones(8, dtype=torch.int32)}


def _decode(heads, kv_heads, dim, tokens=1, paged=False, int8=False, **options):
    return lambda dtype: (
        {
            "q": _heads(8, tokens, heads, dim, dtype),
            **_cache(kv_heads, dim, dtype, paged, int8),
        }
        | options
    )


def _append(kv_heads, dim, paged=False, int8=False):
    return lambda dtype: {
        "k": _heads(8, 1, kv_heads, dim, dtype),
        "v": _heads(8, 1, kv_heads, dim, dtype),
        **_cache(kv_heads, dim, dtype, paged, int8),
    }


_DROPOUT = {"dropout_p": 0.1, "seed": 1}
_CALLS = {
    "softmax": [
        ("1024", _ALL, _softmax(_ROWS, 1024)),
        ("2048+causal", _TWO, _softmax(8, 2048, 2048, causal=True)),
        ("2048+mask", _TWO, _softmax(2, 4, 2048, 2048, mask=(2, 1, 1, 2048))),
        ("50304", _TWO, _softmax(_ROWS, 50304)),
    ],
    "layer_norm": _norms("layer_norm"),
    "rms_norm": _norms("rms_norm"),
    "dropout_add": [
        ("4096+residual", _ALL, _elementwise(4096, ("x", "residual"), **_DROPOUT)),
        ("4096", _ONE, _elementwise(4096, ("x",), **_DROPOUT)),
    ],
    "bias_act": [
        ("3072 gelu", _ALL, _bias_act(3072, "gelu")),
        ("3072 gelu_tanh", _TWO, _bias_act(3072, "gelu_tanh")),
        ("3072 relu", _ONE, _bias_act(3072, "relu")),
        ("3072 silu", _ONE, _bias_act(3072, "silu")),
        ("16384 gelu+dropout", _TWO, _bias_act(16384, "gelu", **_DROPOUT)),
    ],
    "glu": [
        ("11008 silu", _ALL, _elementwise(11008, ("gate", "up"), activation="silu")),
        ("14336 gelu", _TWO, _elementwise(14336, ("gate", "up"), activation="gelu")),
        ("14336 gelu_tanh", _ONE, _elementwise(14336, ("gate", "up"), activation="gelu_tanh")),
    ],
    "rope": [
        ("d64", _ALL, _rope(12, 64)),
        ("d128", _TWO, _rope(32, 128)),
        ("d128 interleaved", _TWO, _rope(32, 128, interleaved=True)),
        ("d128 of 256", _ONE, _rope(8, 256, 128)),
    ],
    "cross_entropy": [
        ("50304", _ALL, _cross_entropy(50304)),
        ("50257", _ONE, _cross_entropy(50257)),
        ("128256", _TWO, _cross_entropy(128256)),
        ("128256+smoothing+z", _TWO, _cross_entropy(128256, label_smoothing=0.1, z_loss=1e-4)),
    ],
    "linear_cross_entropy": [
        ("64x50304", _TWO, _linear_cross_entropy(64, 50304)),
        ("64x128256+bias", _ONE, _linear_cross_entropy(64, 128256, True)),
    ],
    "feed_forward": [
        ("8192 of 768x3072 gelu", _ALL, _feed_forward(8192, 768, 3072)),
        ("8192 of 4096x16384 silu+dropout", _TWO, _feed_forward(8192, 4096, 16384, "silu", **_DROPOUT)),
        ("512 of 768x3072 gelu", _ONE, _feed_forward(512, 768, 3072)),
        ("8 of 4096x16384 gelu", _ONE, _feed_forward(8, 4096, 16384)),
    ],
    "attention": [
        ("d64 causal", _TWO, _attention(12, 64, causal=True)),
        ("d64", _ONE, _attention(12, 64)),
        ("d64 causal+dropout", _ONE, _attention(12, 64, causal=True, **_DROPOUT)),
        ("d64+bias", _TWO, _attention(12, 64, bias=True)),
        ("d64+mask", _ONE, _attention(12, 64, mask=True)),
        ("d64+mask+bias+dropout", _ONE, _attention(12, 64, bias=True, mask=True, **_DROPOUT)),
        ("d64 64 tokens+dropout", _ONE, _attention(12, 64, seq=64, causal=True, **_DROPOUT)),
        ("d64 64 tokens+bias", _ONE, _attention(12, 64, seq=64, bias=True)),
        ("d64 window+softcap", _ONE, _attention(12, 64, causal=True, window=(255, None), softcap=50.0)),
        ("d64 causal+alibi", _ONE, _attention(12, 64, causal=True, alibi=True)),
        ("d96 causal", _ONE, _attention(32, 96, causal=True)),
        ("d128 causal", _ALL, _attention(32, 128, causal=True)),
        ("d128", _ONE, _attention(32, 128)),
        ("d128 causal gqa", _ONE, _attention(32, 128, 8, causal=True)),
        ("d128+lengths", _ONE, _attention(32, 128, 8, lengths=True)),
        ("d128 causal+dropout", _ONE, _attention(32, 128, causal=True, **_DROPOUT)),
        ("d256 causal", _TWO, _attention(8, 256, causal=True)),
        ("d256 window+softcap", _ONE, _attention(8, 256, 4, causal=True, window=(1023, None), softcap=50.0)),
    ],
    "attention_varlen": [
        ("d64 causal", _TWO, _varlen(12, 64, causal=True)),
        ("d64 causal+dropout", _ONE, _varlen(12, 64, causal=True, **_DROPOUT)),
        ("d128 causal gqa", _TWO, _varlen(32, 128, 8, causal=True)),
    ],
    "decode_attention": [
        ("d64", _ALL, _decode(12, 12, 64)),
        ("d128 gqa", _TWO, _decode(32, 8, 128)),
        ("d128 gqa paged", _ONE, _decode(32, 8, 128, paged=True)),
        ("d128 gqa int8", _TWO, _decode(32, 8, 128, int8=True)),
        ("d128 gqa paged int8", _ONE, _decode(32, 8, 128, paged=True, int8=True)),
        ("d128 gqa 4 tokens", _ONE, _decode(32, 8, 128, tokens=4)),
        ("d256", _ONE, _decode(16, 8, 256)),
    ],
    "append_kv": [
        ("d128", _TWO, _append(8, 128)),
        ("d128 paged", _ONE, _append(8, 128, paged=True)),
        ("d128 int8", _TWO, _append(8, 128, int8=True)),
        ("d128 paged int8", _ONE, _append(8, 128, paged=True, int8=True)),
    ],
}
_BESIDE_TORCH = {  # whose products of matrices are torch's with csrc/cuda: it runs them, so small ones
    "feed_forward": [
        ("64x3072 gelu", _ALL, _feed_forward(16, 64, 3072)),
        ("64x16384 silu+dropout", _TWO, _feed_forward(16, 64, 16384, "silu", **_DROPOUT)),
    ],
}
