"""Cases of append_kv: what it writes is judged, and what it must leave as it was."""

import torch

from . import Case
from .decode_attention import paged, with_int8

DIFFERENTIABLE = ()


def _make(d, kv_heads, tokens, slots, dim, lengths, dim_v=None, **options):
    batch, dim_v = len(lengths), dim_v or dim
    made = {"k": d.normal(batch, kv_heads, tokens, dim), "v": d.normal(batch, kv_heads, tokens, dim_v)}
    made |= {"k_cache": d.normal(batch, kv_heads, slots, dim)}
    made |= {"v_cache": d.normal(batch, kv_heads, slots, dim_v)}
    return made | {"kv_lengths": torch.tensor(lengths, dtype=torch.int32)} | options


def _case(*sizes, **options):
    return lambda d: _make(d, *sizes, **options)


def _paged(page, *sizes, **options):
    return lambda d: paged(d, _make(d, *sizes, **options), page)


def _int8(*sizes, page=None, **options):
    def make(d):
        inputs = with_int8(d, _make(d, *sizes, **options))
        return inputs if page is None else paged(d, inputs, page)

    return make


def _packed(d):
    qkv = d.normal(2, 3, 8, 16)  # [batch, tokens, heads of q, k and v, dim], as one projection writes it
    k, v = (qkv[:, :, first : first + 2].transpose(1, 2) for first in (4, 6))
    return _make(d, 2, 3, 40, 16, (37, 11)) | {"k": k, "v": v}


def _strided(d):
    inputs = _make(d, 2, 3, 40, 16, (37, 11))
    k = d.normal(2, 40, 2, 16).transpose(1, 2)
    return inputs | {"k_cache": k, "v_cache": d.slice_of((2, 2, 40, 48), 8, 16)}


def _unusual_numbers(d):
    """Rows of zeros, of NaN and infinity, and ties: halves that must round to even."""
    inputs = with_int8(d, _make(d, 2, 4, 9, 8, (5,)))
    inputs["k"][0, 0, 0] = 0.0
    inputs["k"][0, 0, 1, 3], inputs["k"][0, 0, 2, 4] = float("nan"), float("-inf")
    inputs["v"][0, 1, 0] = torch.tensor([0.5, 1.5, -0.5, -2.5, 127.0, -127.0, 63.5, 126.5])
    return inputs


CASES = [
    Case("plain", _case(2, 1, 16, 16, (15, 0))),
    Case("odd", _case(3, 3, 37, 20, (34, 0, 18), dim_v=12)),
    Case("many-rows", _case(5, 60, 64, 64, (4, 0))),
    Case("one-column", _case(2, 2, 20, 1, (18, 7))),
    Case("empty-batch", _case(2, 1, 9, 16, ())),
    Case("no-tokens", _case(2, 0, 9, 16, (9,))),
    Case("packed", _packed),
    Case("strided", _strided),
    Case("paged", _paged(16, 2, 5, 83, 32, (78, 0, 14))),
    Case("paged-odd", _paged(5, 3, 11, 37, 20, (26, 0, 18), dim_v=12)),
    Case("int8", _int8(2, 5, 40, 32, (35, 0))),
    Case("int8-odd", _int8(3, 3, 37, 20, (34, 0, 18), dim_v=12)),
    Case("int8-paged", _int8(2, 5, 83, 32, (78, 0, 14), page=16)),
    Case("int8-unusual", _unusual_numbers),
]
