"""Cases of decode_attention."""

import torch

from . import Case

DIFFERENTIABLE = ()

_NAN = float("nan")


def _lengths(*lengths):
    return torch.tensor(lengths, dtype=torch.int32)


def _make(d, heads, queries, slots, dim, lengths, kv_heads=None, dim_v=None, **options):
    """Floating caches that are not paged."""
    batch, kv_heads = len(lengths), kv_heads or heads
    q, k = d.normal(batch, heads, queries, dim), d.normal(batch, kv_heads, slots, dim)
    v = d.normal(batch, kv_heads, slots, dim_v or dim)
    return {"q": q, "k_cache": k, "v_cache": v, "kv_lengths": _lengths(*lengths)} | options


def _case(*sizes, **options):
    return lambda d: _make(d, *sizes, **options)


def _odd(d, **options):
    return _make(d, 3, 2, 37, 20, (37, 0, 18), dim_v=12, return_lse=True, **options)


def paged(d, inputs, page):
    """The same cache in shuffled pages of `page` tokens, among pages of NaN that nobody names."""
    batch, _, slots, _ = inputs["k_cache"].shape
    n = -(-slots // page)
    order = torch.randperm(batch * n + 3, generator=torch.Generator().manual_seed(slots))[: batch * n]
    made = {"block_table": order.view(batch, n).int()}
    for name, fill in (("k_cache", _NAN), ("v_cache", _NAN), ("k_scale", _NAN), ("v_scale", _NAN)):
        if name in inputs:
            made[name] = _pages(inputs[name], order, page, fill)
    return inputs | made


def _pages(t, order, page, fill):
    """t [batch, heads, slots, ...] as [pages, heads, page, ...], page order[i] being the i-th."""
    batch, heads, slots = t.shape[:3]
    n, rest = -(-slots // page), t.shape[3:]
    whole = t.new_full((batch, heads, n * page, *rest), fill if t.is_floating_point() else 77)
    whole[:, :, :slots] = t
    parts = whole.view(batch, heads, n, page, *rest).transpose(1, 2).reshape(batch * n, heads, page, *rest)
    pages = t.new_full((batch * n + 3, heads, page, *rest), fill if t.is_floating_point() else 77)
    pages[order] = parts
    return pages


def _paged(page, *sizes, **options):
    return lambda d: paged(d, _make(d, *sizes, **options), page)


def with_int8(d, inputs):
    """The same with int8 caches of random numbers and scales."""
    made = {}
    for name in ("k", "v"):
        shape = inputs[f"{name}_cache"].shape
        made[f"{name}_cache"] = d.integers(-127, 128, *shape, dtype=torch.int8)
        made[f"{name}_scale"] = d.normal(*shape[:3], dtype=torch.float32).abs() / 64
    return inputs | made


def _int8(*sizes, page=None, **options):
    def make(d):
        inputs = with_int8(d, _make(d, *sizes, **options))
        return inputs if page is None else paged(d, inputs, page)

    return make


def _nan_past_the_length(d):
    inputs = _make(d, 2, 1, 37, 24, (0, 5, 37))
    for name in ("k_cache", "v_cache"):
        inputs[name][0], inputs[name][1, :, 5:] = _NAN, _NAN
    return inputs


def _nan_past_the_length_int8(d):
    inputs = with_int8(d, _make(d, 2, 1, 37, 24, (0, 5, 37)))
    for name in ("k_scale", "v_scale"):
        inputs[name][0], inputs[name][1, :, 5:] = _NAN, _NAN
    return inputs


def _int8_small(d):
    """Scales too small for a weight times one of them to be a half, and none but 0."""
    inputs = with_int8(d, _make(d, 2, 2, 70, 16, (70, 37)))
    inputs["v_scale"][0] *= 1e-5
    inputs["k_scale"][1], inputs["v_scale"][1] = 0.0, 0.0
    return inputs


def _packed(d):
    qkv = d.normal(2, 3, 8, 16)  # [batch, queries, heads of q, k and v, dim], as one projection writes it
    caches = _make(d, 4, 3, 40, 16, (40, 11), kv_heads=2)
    return caches | {"q": qkv[:, :, :4].transpose(1, 2)}


def _strided(d):
    """Heads beside each other within a token, and rows that are slices of wider ones."""
    inputs = _make(d, 4, 2, 40, 16, (40, 11), kv_heads=2)
    k = d.normal(2, 40, 2, 16).transpose(1, 2)
    return inputs | {"k_cache": k, "v_cache": d.slice_of((2, 2, 40, 48), 8, 16)}


def _scattered(d):
    inputs = _make(d, 2, 2, 40, 16, (40, 11))
    return inputs | {n: d.normal(2, 2, 16, 40).transpose(2, 3) for n in ("k_cache", "v_cache")}


def _strided_int8(d):
    inputs = with_int8(d, _make(d, 4, 2, 40, 16, (40, 11), kv_heads=2))
    scales = d.normal(2, 40, 2, dtype=torch.float32).abs() / 64
    return inputs | {"k_scale": scales.transpose(1, 2), "v_scale": scales.flip(0).transpose(1, 2)}


def _shared_pages(d):
    """Both sequences begin with the same page; the entries past their lengths name nothing."""
    k, v = d.normal(5, 2, 16, 24), d.normal(5, 2, 16, 24)
    table = torch.tensor([[3, 1, -7], [3, 4, 0]], dtype=torch.int32)
    q = d.normal(2, 4, 1, 24)
    return {"q": q, "k_cache": k, "v_cache": v, "kv_lengths": _lengths(21, 48), "block_table": table}


def _alibi(*shape):
    return lambda d: _odd(d) | {"alibi_slopes": d.normal(*shape, scale=0.3, dtype=torch.float32)}


def _extreme(d):
    """Scores of about 10000 and -10000, those of one sign close enough together to compete."""
    signs = (torch.arange(37) % 2 * 2 - 1)[:, None].to(d.dtype)
    inputs = _make(d, 2, 1, 37, 16, (37,), return_lse=True)
    return inputs | {
        "q": d.normal(1, 2, 1, 16) + 50,
        "k_cache": (d.normal(1, 2, 37, 16, scale=0.05) + 50) * signs,
    }


def _nan_query(d):
    inputs = _make(d, 2, 2, 9, 8, (9,))
    inputs["q"][0, 1, 1, 2] = _NAN
    return inputs


def _everything(d):
    options = {"scale": 0.4, "softcap": 2.0, "window": (300, None), "return_lse": True}
    inputs = with_int8(d, _make(d, 6, 3, 700, 24, (700, 613, 2), kv_heads=2, dim_v=12, **options))
    slopes = d.normal(3, 6, scale=0.02, dtype=torch.float32)
    return paged(d, inputs | {"alibi_slopes": slopes}, 48)


def _low_scores(d):
    """All scores are about -140, far below sums of weights; products and their sums are exact."""
    inputs = _make(d, 2, 1, 90, 20, (90, 33))
    keys = (64 + 8 * inputs["k_cache"]).round() / 64
    return inputs | {"q": torch.full_like(inputs["q"], -32), "k_cache": keys}


def _rising_halves(d):
    """Of 16 rows of a kv head eight meet ever higher scores, and eight never one above their first."""
    inputs = _make(d, 16, 1, 200, 16, (200, 200), kv_heads=1)
    rises = torch.arange(16) < 8
    signs = torch.where(torch.stack([rises, ~rises]), 0.25, -0.25)
    inputs["q"] = signs[:, :, None, None].expand(2, 16, 1, 16).to(d.dtype)
    inputs["k_cache"] = (torch.arange(200) * 0.02)[:, None].expand(2, 1, 200, 16).to(d.dtype)
    return inputs


CASES = [
    Case("plain", _case(4, 1, 48, 16, (48, 9))),
    Case("odd", _odd),
    Case("pieces", _case(2, 1, 1100, 64, (1100, 513), return_lse=True)),
    Case("pieces-odd", _case(2, 3, 1030, 20, (1030, 512), kv_heads=1, return_lse=True)),
    Case("most-pieces", _case(1, 1, 8330, 64, (8330,), return_lse=True)),
    Case("one-key", _case(3, 1, 1, 20, (1, 1))),
    Case("gqa", _case(8, 1, 90, 32, (90, 64), kv_heads=2)),
    Case("mqa-queries", _case(7, 5, 90, 32, (90, 65), kv_heads=1)),
    Case("three-rows", _case(3, 1, 90, 40, (90, 65), kv_heads=1)),
    Case("wide-heads", _case(2, 2, 70, 256, (70, 3), kv_heads=1)),
    Case("one-column", _case(2, 2, 20, 1, (20, 7))),
    Case("wider-values", _case(4, 1, 40, 16, (40, 22), kv_heads=2, dim_v=72)),
    Case("more-queries-than-keys", _case(2, 8, 20, 16, (3, 0, 20), return_lse=True)),
    Case("lengths-nan", _nan_past_the_length),
    Case("lengths-nan-int8", _nan_past_the_length_int8),
    Case("no-slots", _case(2, 1, 0, 16, (0, 0), return_lse=True)),
    Case("empty-batch", _case(2, 1, 9, 16, ())),
    Case("no-queries", _case(2, 0, 9, 16, (4,), return_lse=True)),
    Case("window", _case(2, 3, 90, 16, (90, 20, 1), window=(7, None))),
    Case("window-own", _case(2, 3, 90, 16, (90, 20, 1), window=(0, 0))),
    Case("window-pieces", _case(2, 2, 1400, 16, (1400, 700), window=(600, 0), return_lse=True)),
    Case("softcap", lambda d: _odd(d, softcap=1.5)),
    Case("scale", lambda d: _odd(d, scale=-0.7)),
    Case("alibi-heads", _alibi(3)),
    Case("alibi-batch", _alibi(3, 3)),
    Case("packed", _packed),
    Case("strided", _strided),
    Case("scattered", _scattered),
    Case("paged", _paged(16, 4, 1, 83, 32, (83, 0, 16), kv_heads=2)),
    Case("paged-odd", _paged(5, 3, 2, 37, 20, (37, 0, 18), dim_v=12, return_lse=True)),
    Case("paged-pieces", _paged(100, 2, 1, 1100, 16, (1100, 513))),
    Case("paged-shared", _shared_pages),
    Case("int8", _int8(4, 1, 90, 32, (90, 33), return_lse=True)),
    Case("int8-odd", _int8(3, 2, 37, 20, (37, 0, 18), dim_v=12, return_lse=True)),
    Case("int8-gqa", _int8(8, 3, 90, 32, (90, 33), kv_heads=2)),
    Case("int8-small", _int8_small),
    Case("int8-strided", _strided_int8),
    Case("int8-paged", _int8(4, 1, 83, 32, (83, 0, 16), kv_heads=2, page=16)),
    Case("extreme", _extreme),
    Case("nan-query", _nan_query),
    Case("everything", _everything),
    Case("rising-halves", _rising_halves),
    Case("low-scores", _low_scores),
]
