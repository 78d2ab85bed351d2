"""What decode_attention says to bad input, and to what asks for a gradient."""

import math

import pytest
import torch
from bad_input import assert_told
from decoding import decode_inputs, lengths_of, running

import fastlm
from fastlm._op import OPS
from fastlm.ops import decode_attention

BACKENDS = (*OPS["decode_attention"].backends, "reference")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running(request.param):
        yield request.param


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_what_requires_a_gradient_is_refused_unless_gradients_are_off(backend, name):
    inputs = decode_inputs()
    want = decode_attention(**inputs, backend=backend)
    inputs[name].requires_grad_()
    words = f"decode_attention: {name} must not require a gradient, there is no backward; call it under"
    with pytest.raises(NotImplementedError, match=words):
        decode_attention(**inputs, backend=backend)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(decode_attention(**inputs, backend=backend), want)


def test_cpu_refuses_heads_above_512_with_the_reason_and_the_reference_takes_them():
    inputs = decode_inputs(dim=513)
    reason = "decode_attention.cpu takes head dims up to 512, got 513"
    assert fastlm.explain("decode_attention", **inputs).reasons["cpu"] == reason
    with pytest.raises(NotImplementedError, match=reason):
        decode_attention(**inputs, backend="cpu")
    assert decode_attention(**inputs).shape == (2, 4, 1, 513)


def _zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


_TABLE = {"block_table": torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)}
BAD = [
    ({"q": 1}, TypeError, "q must be a tensor, got int"),
    (
        {"q": _zeros(2, 4, 8)},
        ValueError,
        "q must be [batch, heads, queries, dim] with dim > 0, got torch.float32",
    ),
    (
        {"q": _zeros(2, 4, 1, 8).half()},
        TypeError,
        "k_cache must be torch.float16 as q, or int8, got torch.float32",
    ),
    ({"q": _zeros(2, 4, 1, 9)}, ValueError, "k_cache must have q's dim 9, got 8"),
    ({"q": _zeros(2, 3, 1, 8)}, ValueError, "k_cache must have heads that divide q's 3, got 2"),
    (
        {"q": _zeros(1, 4, 1, 8), "kv_lengths": lengths_of(1)},
        ValueError,
        "k_cache must have q's batch 1, got 2 and",
    ),
    ({"kv_lengths": lengths_of(9, 13)}, ValueError, "kv_lengths must be in [0, 12], got [9, 13]"),
    ({"kv_lengths": lengths_of(-1, 3)}, ValueError, "kv_lengths must be in [0, 12], got [-1, 3]"),
    (
        {"kv_lengths": lengths_of(9, 13)} | _TABLE,
        ValueError,
        "block_table must name pages in [0, 2), got [1, 2] for",
    ),
    ({"kv_lengths": lengths_of(9, 25)} | _TABLE, ValueError, "kv_lengths must be in [0, 24], got [9, 25]"),
    ({"k_scale": _zeros(2, 2, 12)}, ValueError, "k_scale must be None where the caches are not int8, got"),
    ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
    ({"window": 4}, ValueError, "window must be (left, right) or None, got 4"),
    ({"softcap": -1.0}, ValueError, "softcap must not be negative (0 is none), got -1.0"),
    ({"alibi_slopes": _zeros(3)}, ValueError, "alibi_slopes must have shape (4,) or (2, 4) on cpu, got"),
    ({"return_lse": 1}, TypeError, "return_lse must be a bool, got 1"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named_before_any_kernel_runs(change, error, words):
    assert_told(decode_attention, decode_inputs() | change, error, words)
