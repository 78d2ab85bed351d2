"""What attention says to bad input, before any kernel runs."""

import math

import pytest
import torch
from bad_input import assert_told
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm.ops import attention

Q, KV = (2, 6, 5, 8), (2, 3, 7, 8)


def _floats(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def _ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


BAD = [
    ({"q": 1.0}, TypeError, "q must be a tensor, got float"),
    (
        {"q": _floats(*Q, dtype=torch.int64)},
        TypeError,
        "q must be float32, float16, bfloat16 or float64, got torch.int64",
    ),
    (
        {"q": _floats(*Q, dtype=torch.complex64)},
        TypeError,
        "q must be float32, float16, bfloat16 or float64, got",
    ),
    ({"q": _floats(2, 5, 8)}, ValueError, "q must be [batch, heads, seq, dim] with dim > 0, got"),
    ({"q": _floats(2, 6, 5, 0)}, ValueError, "q must be [batch, heads, seq, dim] with dim > 0, got"),
    ({"k": _floats(*KV, dtype=torch.float16)}, TypeError, "k must be torch.float32 as q, got torch.float16"),
    ({"k": _floats(*KV).to("meta")}, ValueError, "k must be on cpu as q, got"),
    (
        {"k": _floats(1, 3, 7, 8)},
        ValueError,
        "k must have q's batch and dim, q being (2, 6, 5, 8), got (1, 3, 7, 8)",
    ),
    (
        {"k": _floats(2, 3, 7, 9)},
        ValueError,
        "k must have q's batch and dim, q being (2, 6, 5, 8), got (2, 3, 7, 9)",
    ),
    ({"k": _floats(2, 4, 7, 8)}, ValueError, "k must have heads that divide q's 6, got 4"),
    ({"k": _floats(2, 0, 7, 8)}, ValueError, "k must have heads that divide q's 6, got 0"),
    (
        {"v": _floats(2, 3, 8, 8)},
        ValueError,
        "v must have k's batch, heads and seq (2, 3, 7), got (2, 3, 8, 8)",
    ),
    ({"v": _floats(*KV).to_sparse()}, TypeError, "v must be a dense tensor, got a torch.sparse_coo one"),
    (
        {"causal": True},
        ValueError,
        "causal must be 'top_left' (first query beside first key) or 'bottom_right'",
    ),
    (
        {"causal": "left"},
        ValueError,
        "causal must be one of False, True, 'top_left', 'bottom_right', got 'left'",
    ),
    (
        {"causal": torch.tensor(True)},
        ValueError,
        "causal must be one of False, True, 'top_left', 'bottom_right', got",
    ),
    (
        {"mask": _floats(5, 7)},
        TypeError,
        "mask must be boolean, True = attend (what is added is the bias), got torch.f",
    ),
    ({"mask": True}, TypeError, "mask must be boolean, True = attend (what is added is the bias), got bool"),
    (
        {"mask": _floats(7, 5).bool()},
        ValueError,
        "mask must broadcast to [batch, heads, queries, keys] (2, 6, 5, 7)",
    ),
    (
        {"mask": _floats(1, 2, 6, 5, 7).bool()},
        ValueError,
        "mask must broadcast to [batch, heads, queries, keys]",
    ),
    (
        {"bias": _floats(5, 7).bool()},
        TypeError,
        "bias must be float32, float16, bfloat16 or float64, got torch.bool",
    ),
    (
        {"bias": _floats(5, 7, dtype=torch.bfloat16)},
        TypeError,
        "bias must be torch.float32 as q or float32, got",
    ),
    (
        {"bias": _floats(3, 5, 7)},
        ValueError,
        "bias must broadcast to [batch, heads, queries, keys] (2, 6, 5, 7) on cpu",
    ),
    ({"bias": _floats(5, 7).to("meta")}, ValueError, "bias must broadcast to [batch, heads, queries, keys]"),
    ({"kv_lengths": [5, 7]}, TypeError, "kv_lengths must be an int32 tensor, got list"),
    (
        {"kv_lengths": _ints(5, 7, dtype=torch.int64)},
        TypeError,
        "kv_lengths must be an int32 tensor, got torch.int64",
    ),
    (
        {"kv_lengths": _ints(5)},
        ValueError,
        "kv_lengths must have shape (2,) on cpu, got torch.int32 of shape (1,)",
    ),
    ({"kv_lengths": _ints(5, 8)}, ValueError, "kv_lengths must be in [0, 7], got [5, 8]"),
    ({"kv_lengths": _ints(-1, 7)}, ValueError, "kv_lengths must be in [0, 7], got [-1, 7]"),
    ({"scale": "big"}, TypeError, "scale must be a number, got str"),
    ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
    ({"window": 4}, ValueError, "window must be (left, right) or None, got 4"),
    ({"window": (4, 2, 1)}, ValueError, "window must be (left, right) or None, got (4, 2, 1)"),
    ({"window": (4, -1)}, ValueError, "window must hold counts of keys, or None for no limit, got (4, -1)"),
    (
        {"window": (4.5, None)},
        ValueError,
        "window must hold counts of keys, or None for no limit, got (4.5, None)",
    ),
    ({"softcap": -1.0}, ValueError, "softcap must not be negative (0 is none), got -1.0"),
    ({"softcap": math.nan}, ValueError, "softcap must be finite, got nan"),
    ({"alibi_slopes": [1.0]}, TypeError, "alibi_slopes must be a tensor, got list"),
    (
        {"alibi_slopes": _floats(6, dtype=torch.float16)},
        TypeError,
        "alibi_slopes must be float32, got torch.float16",
    ),
    (
        {"alibi_slopes": _floats(6, dtype=torch.float64)},
        TypeError,
        "alibi_slopes must be float32, got torch.float64",
    ),
    ({"alibi_slopes": _floats(3)}, ValueError, "alibi_slopes must have shape (6,) or (2, 6) on cpu, got"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"dropout_p": True}, TypeError, "dropout_p must be a float, got bool"),
    (
        {"dropout_p": 0.1, "seed": 2**63},
        ValueError,
        "seed must be None, a 64-bit int or an int64 tensor, got",
    ),
    ({"dropout_p": 0.1, "seed": _ints(1)}, ValueError, "seed must be int64 of one element on cpu, got"),
    ({"return_lse": 1}, TypeError, "return_lse must be a bool, got 1"),
    (
        {"backend": "mps"},
        ValueError,
        "backend must be one of cuda, triton, cpu, reference or None, got 'mps'",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "words"), BAD, ids=lambda p: "-".join(p) if isinstance(p, dict) else ""
)
def test_attention_names_the_argument_and_what_it_got(change, error, words):
    arguments = {"q": torch.randn(Q), "k": torch.randn(KV), "v": torch.randn(KV)} | change
    assert_told(attention, arguments, error, words)


def test_causal_true_on_unequal_lengths_names_both_choices():
    with pytest.raises(ValueError, match="'top_left'.*'bottom_right'.*got True with 5 and 7"):
        attention(torch.randn(Q), torch.randn(KV), torch.randn(KV), causal=True)


def test_cpu_refuses_heads_above_512_with_the_reason_and_the_reference_takes_them():
    q = torch.randn(1, 1, 2, 513)
    narrow = torch.randn(1, 1, 2, 8)
    for query, key, value in ((q, q, narrow), (narrow, narrow, q)):
        reason = "attention.cpu takes head dims up to 512, got 513"
        assert fastlm.explain("attention", query, key, value).reasons["cpu"] == reason
        with pytest.raises(NotImplementedError, match=reason):
            attention(query, key, value, backend="cpu")
        assert attention(query, key, value).shape == value.shape


def test_lengths_are_not_looked_at_where_their_values_are_not_there():
    with FakeTensorMode():
        q, lengths = torch.randn(2, 1, 3, 8), torch.zeros(2, dtype=torch.int32)
        assert attention(q, q, q, kv_lengths=lengths).shape == q.shape
    q, lengths = torch.randn(2, 1, 3, 8, device="meta"), torch.zeros(2, dtype=torch.int32, device="meta")
    assert attention(q, q, q, kv_lengths=lengths).shape == q.shape
