"""Cases of attention."""

import torch

from . import Case, p_at_a_word
from .tiled_heads import tiled, tokens

DIFFERENTIABLE = ("q", "k", "v", "bias")

_NAN, _INF = float("nan"), float("inf")


def qkv(d, batch, heads, queries, keys, dim, kv_heads=None, dim_v=None):
    """q, k and v by name; as many key heads as heads and dim_v = dim unless told."""
    kv_heads, dim_v = kv_heads or heads, dim_v or dim
    q, k = d.normal(batch, heads, queries, dim), d.normal(batch, kv_heads, keys, dim)
    return {"q": q, "k": k, "v": d.normal(batch, kv_heads, keys, dim_v)}


def _odd(d):
    return qkv(d, 2, 3, 41, 37, 20)


def _lengths(*lengths):
    return torch.tensor(lengths, dtype=torch.int32)


def _left_padding(*padding, keys):
    return (torch.arange(keys) >= torch.tensor(padding)[:, None])[:, None, None, :]


def _packed(seq, dim):
    def made(d):
        qkv = d.normal(2, seq, 3, 4, dim)  # [batch, seq, which, heads, dim], as one projection writes it
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return {"q": q, "k": k, "v": v, "causal": True}

    return made


def _transposed(d):
    q, k, v = (d.normal(2, seq, 3, 20).transpose(1, 2) for seq in (41, 37, 37))
    return {"q": q, "k": k, "v": v}


def _scattered(d):
    q, k, v = (d.normal(2, 3, 20, seq).transpose(2, 3) for seq in (41, 37, 37))
    return {"q": q, "k": k, "v": v}


def _with_empty_row(d):
    mask = d.booleans(2, 3, 41, 37)
    mask[1, 2, 5] = False
    return _odd(d) | {"mask": mask, "return_lse": True}


def _bias(*shape, dtype=None, **options):
    return lambda d: _odd(d) | {"bias": d.normal(*shape, dtype=dtype)} | options


def _corners(d):
    """Of a tile of 64 queries and 32 keys, or of 32 and 32, the window keeps one pair in a corner."""
    return qkv(d, 1, 2, 67, 67, 20) | {"bias": d.normal(2, 67, 67), "window": (1, 1)}


def _scalar_bias(d):
    """Few scores: the gradient is one sum of them all, and of a long one the rounding is a matter of luck."""
    return qkv(d, 2, 2, 3, 5, 20) | {"bias": d.normal(), "return_lse": True}


def _bias_that_masks(d):
    bias = d.normal(1, 3, 41, 37).masked_fill(d.booleans(1, 3, 41, 37, p=0.3), -_INF)
    bias[0, 1, 7] = -_INF
    return _odd(d) | {"bias": bias, "return_lse": True}


def _nan_past_the_length(length, keys, dim):
    def made(d):
        inputs = qkv(d, 3, 2, 20, keys, dim) | {"kv_lengths": _lengths(0, length, keys)}
        for name in "kv":
            inputs[name][0], inputs[name][1, :, length:] = _NAN, _NAN
        return inputs

    return made


def _extreme(d):
    """Scores of about 10000 and -10000, those of one sign close enough together to compete."""
    signs = (torch.arange(37) % 2 * 2 - 1)[:, None].to(d.dtype)
    q, k = d.normal(1, 2, 41, 16) + 50, (d.normal(1, 2, 37, 16, scale=0.05) + 50) * signs
    return {"q": q, "k": k, "v": d.normal(1, 2, 37, 16), "return_lse": True}


def _nan_query(d):
    inputs = qkv(d, 1, 2, 10, 9, 8)
    inputs["q"][0, 1, 3, 2] = _NAN
    return inputs


def _everything(d):
    mask = d.booleans(2, 1, 41, 51, p=0.8)
    bias = d.normal(1, 6, 41, 51, dtype=torch.float32).masked_fill(d.booleans(41, 51, p=0.1), -_INF)
    inputs = qkv(d, 2, 6, 41, 51, 20, kv_heads=2, dim_v=12) | {
        "causal": "bottom_right",
        "window": (30, None),
    }
    inputs |= {"mask": mask, "bias": bias, "kv_lengths": _lengths(51, 23), "scale": 0.4, "softcap": 2.0}
    slopes = d.normal(2, 6, scale=0.2, dtype=torch.float32)
    return inputs | {"alibi_slopes": slopes, "dropout_p": 0.2, "seed": 12, "return_lse": True}


def _with(make, **options):
    return lambda d: make(d) | options


def _shape(*sizes, **options):
    heads = {name: options.pop(name) for name in ("kv_heads", "dim_v") if name in options}
    return lambda d: qkv(d, *sizes, **heads) | options


def _slopes(*shape, **options):
    return lambda d: _odd(d) | {"alibi_slopes": d.normal(*shape, scale=0.3, dtype=torch.float32)} | options


CASES = [
    Case("plain", _shape(2, 3, 32, 32, 16)),
    Case("odd", _odd),
    Case("tiles-causal", _shape(1, 2, 300, 300, 64, causal=True, return_lse=True)),
    Case("tiles-keys", _shape(1, 2, 70, 530, 32)),
    Case("tiles-queries", _shape(1, 2, 530, 70, 32, causal="bottom_right")),
    Case("tiles-window", _shape(1, 2, 300, 300, 24, window=(40, 10))),
    Case("wide-heads", _shape(1, 2, 19, 23, 256)),
    Case("one-column", _shape(2, 2, 9, 11, 1)),
    Case("single-query", _shape(2, 3, 1, 37, 20, causal="bottom_right")),
    Case("one-key", _shape(2, 3, 7, 1, 20)),
    Case("wider-values", _shape(2, 2, 21, 19, 20, dim_v=40)),
    Case("narrower-values", _shape(2, 2, 21, 19, 40, dim_v=9)),
    Case("gqa", _shape(2, 6, 41, 37, 20, kv_heads=2)),
    Case("mqa", _shape(2, 4, 33, 33, 16, kv_heads=1, causal=True)),
    Case("causal-odd", _shape(2, 2, 39, 39, 20, causal=True)),
    Case("top-left-more-keys", _shape(2, 2, 19, 37, 20, causal="top_left")),
    Case("top-left-more-queries", _shape(2, 2, 41, 17, 20, causal="top_left")),
    Case("bottom-right-more-keys", _shape(2, 2, 19, 37, 20, causal="bottom_right")),
    Case("bottom-right-empty-rows", _shape(2, 2, 41, 17, 20, causal="bottom_right", return_lse=True)),
    Case("window-left", _with(_odd, window=(5, None))),
    Case("window-right", _with(_odd, window=(None, 3), return_lse=True)),
    Case("window-both", _with(_odd, window=(4, 2))),
    Case("window-diagonal", _shape(2, 2, 37, 37, 20, window=(0, 0))),
    Case("window-causal", _shape(2, 2, 39, 39, 20, window=(7, None), causal=True)),
    Case("window-top-left", _with(_odd, window=(3, 9), causal="top_left")),
    Case("mask-matrix", lambda d: _odd(d) | {"mask": d.booleans(41, 37)}),
    Case("mask-left-padding", lambda d: _odd(d) | {"mask": _left_padding(0, 11, keys=37)}),
    Case("mask-causal-padding", _shape(2, 2, 37, 37, 20, mask=_left_padding(0, 36, keys=37), causal=True)),
    Case("mask-full", lambda d: _odd(d) | {"mask": d.booleans(2, 3, 41, 37)}),
    Case("mask-transposed", lambda d: _odd(d) | {"mask": d.booleans(37, 41).t()}),
    Case("mask-empty-row", _with_empty_row),
    Case("mask-nothing", _with(_odd, mask=torch.zeros((), dtype=torch.bool), return_lse=True)),
    Case("bias-full", _bias(2, 3, 41, 37)),
    Case("bias-heads", _bias(3, 41, 37)),
    Case("bias-matrix", _bias(41, 37)),
    Case("bias-keys", _bias(2, 1, 1, 37)),
    Case(
        "bias-queries", _bias(2, 3, 41, 1, return_lse=True)
    ),  # of out alone its gradient is 0, but for rounding
    Case("bias-batch", _bias(2, 1, 41, 37)),
    Case("bias-scalar", _scalar_bias),
    Case("bias-masks", _bias_that_masks),
    Case("bias-float32", _bias(1, 3, 41, 37, dtype=torch.float32)),
    Case("bias-slice", lambda d: _odd(d) | {"bias": d.slice_of((3, 41, 80), 20, 37)}),
    Case("bias-expanded", lambda d: _odd(d) | {"bias": d.normal(1, 1, 41, 37).expand(2, 3, 41, 37)}),
    Case("bias-causal", lambda d: _shape(1, 2, 39, 39, 20, causal=True)(d) | {"bias": d.normal(2, 39, 39)}),
    Case("lengths", _shape(3, 2, 20, 37, 20, kv_lengths=_lengths(37, 0, 18), return_lse=True)),
    Case("lengths-nan", _nan_past_the_length(5, 37, 20)),
    Case("lengths-nan-in-place", _nan_past_the_length(8, 36, 16)),
    Case("lengths-causal", _shape(2, 2, 20, 37, 20, kv_lengths=_lengths(21, 9), causal="bottom_right")),
    Case("softcap", _with(_odd, softcap=1.5)),
    Case("softcap-lse", _with(_odd, softcap=30.0, return_lse=True)),
    Case("alibi-heads", _slopes(3)),
    Case("alibi-batch", _slopes(2, 3, causal="top_left")),
    Case("dropout", _with(_odd, dropout_p=p_at_a_word(6, 0), seed=6)),
    Case("dropout-causal", _shape(1, 2, 150, 150, 20, causal=True, dropout_p=0.3, seed=-9, return_lse=True)),
    Case("dropout-gqa", _shape(2, 4, 22, 38, 20, kv_heads=2, dropout_p=0.9, seed=6)),
    Case("lse", _with(_odd, return_lse=True)),
    Case("scale", _with(_odd, scale=1.0)),
    Case("scale-negative", _with(_odd, scale=-0.3)),
    Case("packed", _packed(33, 16)),
    Case("packed-in-place", _packed(32, 32)),  # few rows in whole cache lines: not copied
    Case("transposed", _transposed),
    Case("scattered", _scattered),
    Case("expanded", lambda d: _odd(d) | {n: d.normal(1, 1, 37, 20).expand(2, 3, 37, 20) for n in "kv"}),
    Case("empty-batch", _shape(0, 2, 9, 9, 8)),
    Case("no-queries", _shape(2, 2, 0, 9, 8, return_lse=True)),
    Case("no-keys", _shape(2, 2, 9, 0, 8, return_lse=True)),
    Case("extreme", _extreme),
    Case("nan-query", _nan_query),
    Case("everything", _everything),
    Case("tiles-one-key-short", _shape(1, 2, 9, 127, 16)),
    Case("bias-tiles-seen-by-a-corner", _corners),
    Case("window-past-keys", _shape(1, 2, 5, 300, 20, causal="bottom_right", window=(7, None))),
    *(
        Case(f"dropout-word-{n}", _shape(1, 1, 5, 9, 20, dropout_p=p_at_a_word(6, 0, n), seed=6))
        for n in (1, 2, 3)
    ),
]


def _everything_of(dim):
    """Every option at once over several tiles; v as wide as q."""

    def made(d):
        wide = dim == 256  # its tiles are smaller
        queries, keys = (tokens(d, 70), tokens(d, 90)) if wide else (70, tokens(d, 150))
        mask = d.booleans(2, 1, queries, keys, p=0.8)
        bias = d.normal(1, 2, queries, keys).masked_fill(d.booleans(queries, keys, p=0.1), -_INF)
        inputs = qkv(d, 2, 2, queries, keys, dim, kv_heads=1)
        inputs |= {"causal": "bottom_right", "window": (keys * 3 // 5, None)}
        inputs |= {"mask": mask, "bias": bias, "kv_lengths": _lengths(keys, keys * 5 // 9), "softcap": 2.0}
        slopes = d.normal(2, 2, scale=0.1, dtype=torch.float32)
        return inputs | {"alibi_slopes": slopes, "dropout_p": 0.2, "seed": 12, "return_lse": True}

    return made


def _heads(dim, count):
    def made(d):
        return qkv(d, 1, 2, tokens(d, count), tokens(d, count), dim, kv_heads=1) | {"causal": True}

    return Case(f"heads-{dim}", made)


_HEADS = [  # of every width that csrc/cuda has tiles of, in several of them
    *(_heads(n, 150) for n in (32, 96, 128)),
    _heads(256, 80),
    *(Case(f"everything-{n}", _everything_of(n)) for n in (64, 96, 128, 256)),
    Case("unaligned", lambda d: {n: d.slice_of((2, 3, 41, 36), 3, 32) for n in "qkv"}),
]
CASES_OF = {"cuda": tiled(CASES) + _HEADS}
