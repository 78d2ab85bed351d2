"""Cases of attention_varlen."""

import torch

from . import Case, p_at_a_word
from .tiled_heads import tiled, tokens

DIFFERENTIABLE = ("q", "k", "v")

_NAN = float("nan")


def _starts(lengths):
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def _sequences(q_lengths, k_lengths):
    """cu_seqlens and maxima; one tensor serves both sides if they are given as one."""
    starts = _starts(q_lengths)
    keys = starts if k_lengths is q_lengths else _starts(k_lengths)
    limits = {"max_q": max(q_lengths, default=0), "max_k": max(k_lengths, default=0)}
    return {"cu_seqlens_q": starts, "cu_seqlens_k": keys} | limits


def _qkv(d, q_lengths, k_lengths=None, heads=3, dim=20, kv_heads=None, dim_v=None):
    k_lengths = q_lengths if k_lengths is None else k_lengths
    kv_heads, dim_v = kv_heads or heads, dim_v or dim
    q, k = d.normal(sum(q_lengths), heads, dim), d.normal(sum(k_lengths), kv_heads, dim)
    inputs = {"q": q, "k": k, "v": d.normal(sum(k_lengths), kv_heads, dim_v)}
    return inputs | _sequences(q_lengths, k_lengths)


def _odd(d):
    return _qkv(d, (17, 1, 5), (3, 19, 8))


def _shape(*lengths, heads=3, dim=20, kv_heads=None, dim_v=None, **options):
    return lambda d: _qkv(d, *lengths, heads=heads, dim=dim, kv_heads=kv_heads, dim_v=dim_v) | options


def _with(make, **options):
    return lambda d: make(d) | options


def _slopes(*shape, **options):
    return lambda d: _odd(d) | {"alibi_slopes": d.normal(*shape, scale=0.3, dtype=torch.float32)} | options


def _packed(d):
    q, k, v = d.normal(33, 3, 4, 16).unbind(1)  # [tokens, which, heads, dim], as one projection writes it
    lengths = (20, 13)
    return {"q": q, "k": k, "v": v, "causal": True} | _sequences(lengths, lengths)


def _heads_outside(d):
    q, k, v = (d.normal(3, tokens, 20).transpose(0, 1) for tokens in (23, 30, 30))
    return _odd(d) | {"q": q, "k": k, "v": v}


def _scattered(d):
    q, k, v = (d.normal(3, 20, tokens).permute(2, 0, 1) for tokens in (23, 30, 30))
    return _odd(d) | {"q": q, "k": k, "v": v}


def _nan_neighbours(d):
    inputs = _qkv(d, (7, 9, 6))
    inputs["k"][:7], inputs["v"][16:] = _NAN, _NAN
    return inputs


def _extreme(d):
    """Scores of about 10000 and -10000, those of one sign close enough together to compete."""
    inputs = _qkv(d, (13, 28), (30, 7), heads=2, dim=16)
    signs = (torch.arange(37) % 2 * 2 - 1)[:, None, None].to(d.dtype)
    inputs["q"], inputs["k"] = d.normal(41, 2, 16) + 50, (d.normal(37, 2, 16, scale=0.05) + 50) * signs
    return inputs | {"return_lse": True}


def _everything(d):
    inputs = _qkv(d, (31, 0, 12, 40), (40, 5, 0, 21), heads=6, kv_heads=2, dim_v=12)
    inputs |= {"causal": "bottom_right", "window": (25, None), "scale": 0.4, "softcap": 2.0}
    slopes = d.normal(4, 6, scale=0.2, dtype=torch.float32)
    return inputs | {"alibi_slopes": slopes, "dropout_p": 0.2, "seed": 12, "return_lse": True}


CASES = [
    Case("plain", _shape((16, 8, 24), dim=16)),
    Case("odd", _odd),
    Case("one-sequence", _shape((41,), (37,))),
    Case("single-tokens", _shape((1, 1, 1, 1, 1))),
    Case("one-column", _shape((9, 4), (5, 11), dim=1)),
    Case("wide-heads", _shape((19, 5), heads=2, dim=256)),
    Case("wider-values", _shape((21, 4), dim_v=40)),
    Case("narrower-values", _shape((21, 4), dim=40, dim_v=9)),
    Case("zero-lengths", _shape((0, 7, 0, 0, 9, 0), (0, 0, 4, 0, 11, 3), return_lse=True)),
    Case("empty-batch", _shape((), return_lse=True)),
    Case("no-tokens", _shape((0, 0), return_lse=True)),
    Case("no-keys", _shape((4, 5), (0, 0), return_lse=True)),
    Case("no-queries", _shape((0, 0), (4, 5), return_lse=True)),
    Case("tiles-causal", _shape((300, 40, 130), heads=2, dim=64, causal=True, return_lse=True)),
    Case("tiles-keys", _shape((70, 9), (530, 300), heads=2, dim=32)),
    Case("long-among-short", _shape((3, 700, 20), (9, 600, 5), heads=1, causal="bottom_right")),
    Case("gqa", _shape((17, 1, 25), (21, 9, 4), heads=6, kv_heads=2)),
    Case("mqa", _shape((33, 12), heads=4, kv_heads=1, causal=True)),
    Case("causal", _shape((39, 2, 16), causal=True)),
    Case("top-left", _shape((19, 30), (37, 12), causal="top_left")),
    Case("bottom-right", _shape((19, 8), (37, 8), causal="bottom_right")),
    Case("bottom-right-empty-rows", _shape((41, 3), (17, 9), causal="bottom_right", return_lse=True)),
    Case("window-left", _with(_odd, window=(5, None))),
    Case("window-right", _with(_odd, window=(None, 3), return_lse=True)),
    Case("window-both", _shape((41, 9), (37, 30), window=(4, 2))),
    Case("window-causal", _shape((39, 20), window=(7, None), causal=True)),
    Case("window-top-left", _shape((41, 9), (37, 30), window=(3, 9), causal="top_left")),
    Case("softcap", _with(_odd, softcap=1.5)),
    Case("alibi-heads", _slopes(3)),
    Case("alibi-sequences", _slopes(3, 3, causal="top_left")),
    Case("dropout", _with(_odd, dropout_p=p_at_a_word(6, 0), seed=6)),
    Case("dropout-causal", _shape((150, 30), heads=2, causal=True, dropout_p=0.3, seed=-9, return_lse=True)),
    Case("dropout-gqa", _shape((22, 7), (38, 9), heads=4, kv_heads=2, dropout_p=0.9, seed=6)),
    Case("lse", _with(_odd, return_lse=True)),
    Case("scale-negative", _with(_odd, scale=-0.3)),
    Case("maxima-above", _with(_odd, max_q=40, max_k=64)),
    Case("packed", _packed),
    Case("heads-outside", _heads_outside),
    Case("scattered", _scattered),
    Case("nan-neighbours", _nan_neighbours),
    Case("extreme", _extreme),
    Case("everything", _everything),
]


def _heads(dim, *lengths):
    def made(d):
        queries, keys = (tuple(tokens(d, n) for n in some) for some in lengths)
        return _qkv(d, queries, keys, heads=2, kv_heads=1, dim=dim) | {"causal": "bottom_right"}

    return Case(f"heads-{dim}", made)


_HEADS = [  # of every width that csrc/cuda has tiles of, in several of them
    *(_heads(n, (130, 20), (150, 40)) for n in (32, 96, 128)),
    _heads(256, (75, 20), (85, 40)),
]
CASES_OF = {"cuda": tiled(CASES) + _HEADS}
