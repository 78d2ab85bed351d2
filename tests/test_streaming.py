"""Outputs too large for the caches are written around them: they must hold what a small call computes."""

import pytest
import torch

from fastlm import ops

LIMIT = 8 << 20  # bytes, csrc/cpu/streaming.h
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

WEIGHT = torch.linspace(0.5, 1.5, 256)
TABLE = torch.linspace(-1, 1, 256 * 256).view(256, 256)
CALLS = {
    "layer_norm": lambda x: ops.layer_norm(x, WEIGHT.to(x.dtype), WEIGHT.to(x.dtype)),
    "layer_norm_dropout": lambda x: ops.layer_norm(x, residual=x.flip(-1), dropout_p=0.5, seed=1).y,
    "rms_norm": lambda x: ops.rms_norm(x, WEIGHT.to(x.dtype)),
    "softmax": lambda x: ops.softmax(x),
    "softmax_causal": lambda x: ops.softmax(x, causal=True),
    "bias_act": lambda x: ops.bias_act(x, WEIGHT.to(x.dtype), "gelu_tanh"),
    "bias_act_dropout": lambda x: ops.bias_act(x, dropout_p=0.5, seed=1),
    "glu": lambda x: ops.glu(x, x.flip(-1)),
    "dropout_add": lambda x: ops.dropout_add(x, x.flip(-1)),
    "dropout_add_dropout": lambda x: ops.dropout_add(x, dropout_p=0.5, seed=1),
    "rope": lambda x: ops.rope(x.unsqueeze(1), TABLE.cos(), TABLE.sin()).squeeze(1),
}


def _value_and_gradient(call, x, dy):
    x = x.detach().requires_grad_()
    y = call(x)
    y.backward(dy)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_a_large_output_holds_what_a_small_call_computes(name, dtype):
    size = 256 * 256  # of one matrix, the smallest piece that every op takes alike
    count = LIMIT // (size * dtype.itemsize) + 2
    small = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    x, dy = (t.repeat(count // 2 + 1, 1, 1) for t in (small, small.flip(0)))
    expected = _value_and_gradient(CALLS[name], small, small.flip(0))
    for got, part in zip(_value_and_gradient(CALLS[name], x, dy), expected, strict=True):
        assert torch.equal(got[:2], part)
        if "dropout" not in name:  # whose mask goes on from row to row
            assert torch.equal(got[-2:], part)


def test_rows_that_are_not_whole_cache_lines_are_written_as_well():
    x = torch.randn(LIMIT // (251 * 4) + 1, 251, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.softmax(x)[-5:], ops.softmax(x[-5:]))
    assert torch.equal(ops.layer_norm(x)[-5:], ops.layer_norm(x[-5:]))
    assert torch.equal(ops.bias_act(x)[-5:], ops.bias_act(x[-5:]))
    assert torch.equal(ops.glu(x, x)[-5:], ops.glu(x[-5:], x[-5:]))
