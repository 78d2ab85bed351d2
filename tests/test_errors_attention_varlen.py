"""What attention_varlen says to bad input, before any kernel runs; what it shares with attention is there."""

import pytest
import torch
from bad_input import assert_told
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm.ops import attention_varlen

Q, KV = (9, 6, 8), (7, 3, 8)


def _ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


BAD = [
    ({"q": 1.0}, TypeError, "q must be a tensor, got float"),
    ({"q": torch.zeros(1, 9, 6, 8)}, ValueError, "q must be [tokens, heads, dim] with dim > 0, got"),
    ({"q": torch.zeros(9, 6, 0)}, ValueError, "q must be [tokens, heads, dim] with dim > 0, got"),
    ({"k": torch.zeros(KV).half()}, TypeError, "k must be torch.float32 as q, got torch.float16"),
    ({"k": torch.zeros(KV, device="meta")}, ValueError, "k must be on cpu as q, got"),
    ({"k": torch.zeros(7, 3, 9)}, ValueError, "k must have q's dim, q being (9, 6, 8), got (7, 3, 9)"),
    ({"k": torch.zeros(7, 4, 8)}, ValueError, "k must have heads that divide q's 6, got 4"),
    ({"v": torch.zeros(8, 3, 8)}, ValueError, "v must have k's tokens and heads (7, 3), got (8, 3, 8)"),
    ({"cu_seqlens_q": [0, 4, 9]}, TypeError, "cu_seqlens_q must be an int32 tensor, got list"),
    (
        {"cu_seqlens_q": _ints(0, 4, 9, dtype=torch.int64)},
        TypeError,
        "cu_seqlens_q must be an int32 tensor, got torch.int64",
    ),
    (
        {"cu_seqlens_k": _ints(0, 7).reshape(1, 2)},
        ValueError,
        "cu_seqlens_k must be [sequences + 1] on cpu, got torch.int32 of shape (1, 2)",
    ),
    ({"cu_seqlens_q": _ints()}, ValueError, "cu_seqlens_q must be [sequences + 1] on cpu, got"),
    ({"cu_seqlens_q": _ints(0, 4, 9).to("meta")}, ValueError, "cu_seqlens_q must be [sequences + 1] on cpu"),
    (
        {"cu_seqlens_k": _ints(0, 7), "max_k": 7},
        ValueError,
        "cu_seqlens_k must have cu_seqlens_q's shape (3,), got (2,)",
    ),
    (
        {"cu_seqlens_q": _ints(1, 4, 9)},
        ValueError,
        "cu_seqlens_q must go from 0 to the 9 tokens, got 1 to 9",
    ),
    (
        {"cu_seqlens_k": _ints(0, 4, 9)},
        ValueError,
        "cu_seqlens_k must go from 0 to the 7 tokens, got 0 to 9",
    ),
    (
        {"cu_seqlens_k": _ints(0, 4, 5)},
        ValueError,
        "cu_seqlens_k must go from 0 to the 7 tokens, got 0 to 5",
    ),
    ({"cu_seqlens_q": _ints(0, 12, 9)}, ValueError, "cu_seqlens_q must not decrease, got a step of -3"),
    ({"max_q": 4}, ValueError, "max_q must be at least the longest sequence's 5, got 4"),
    ({"max_k": 3}, ValueError, "max_k must be at least the longest sequence's 4, got 3"),
    ({"max_k": 4.0}, TypeError, "max_k must be an int, got float"),
    ({"max_q": True}, TypeError, "max_q must be an int, got bool"),
    ({"max_q": -1}, ValueError, "max_q must not be negative, got -1"),
    (
        {"causal": True},
        ValueError,
        "causal must be 'top_left' (first query beside first key) or 'bottom_right' (last beside last) unless"
        " cu_seqlens_q is cu_seqlens_k, one and the same tensor, got True with two",
    ),
    ({"causal": 1}, ValueError, "causal must be one of False, True, 'top_left', 'bottom_right', got 1"),
    ({"window": 3}, ValueError, "window must be (left, right) or None, got 3"),
    ({"scale": "big"}, TypeError, "scale must be a number, got str"),
    ({"softcap": -1.0}, ValueError, "softcap must not be negative (0 is none), got -1.0"),
    (
        {"alibi_slopes": torch.zeros(3, 6)},
        ValueError,
        "alibi_slopes must have shape (6,) or (2, 6) on cpu, got",
    ),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"return_lse": 1}, TypeError, "return_lse must be a bool, got 1"),
]


def _arguments():
    tensors = {"q": torch.randn(Q), "k": torch.randn(KV), "v": torch.randn(KV)}
    return tensors | {"cu_seqlens_q": _ints(0, 4, 9), "cu_seqlens_k": _ints(0, 3, 7), "max_q": 5, "max_k": 4}


@pytest.mark.parametrize(
    ("change", "error", "words"), BAD, ids=lambda p: "-".join(p) if isinstance(p, dict) else ""
)
def test_attention_varlen_names_the_argument_and_what_it_got(change, error, words):
    assert_told(attention_varlen, _arguments() | change, error, words)


def test_causal_true_wants_the_very_same_starts_and_as_many_keys():
    q, cu = torch.randn(9, 2, 8), _ints(0, 4, 9)
    assert attention_varlen(q, q, q, cu, cu, 5, 5, causal=True).shape == q.shape
    with pytest.raises(ValueError, match="unless cu_seqlens_q is cu_seqlens_k"):
        attention_varlen(q, q, q, cu, cu.clone(), 5, 5, causal=True)


def test_cpu_refuses_heads_above_512_with_the_reason_and_the_reference_takes_them():
    q, narrow, cu = torch.randn(2, 1, 513), torch.randn(2, 1, 8), _ints(0, 2)
    for query, value in ((q, narrow), (narrow, q)):
        reason = "attention_varlen.cpu takes head dims up to 512, got 513"
        arguments = (query, query, value, cu, cu, 2, 2)
        assert fastlm.explain("attention_varlen", *arguments).reasons["cpu"] == reason
        with pytest.raises(NotImplementedError, match=reason):
            attention_varlen(*arguments, backend="cpu")
        assert attention_varlen(*arguments).shape == value.shape


def test_starts_are_not_looked_at_where_their_values_are_not_there():
    with FakeTensorMode():
        q, cu = torch.randn(6, 1, 8), torch.zeros(3, dtype=torch.int32)
        assert attention_varlen(q, q, q, cu, cu, 3, 3).shape == q.shape
    q, cu = torch.randn(6, 1, 8, device="meta"), torch.zeros(3, dtype=torch.int32, device="meta")
    assert attention_varlen(q, q, q, cu, cu, 3, 3).shape == q.shape
