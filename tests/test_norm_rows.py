"""Rows of every length in half precision, beside which float32 weights are kept in an order of their own."""

import pytest
import torch

from fastlm import ops

NORMS = {
    "layer_norm": lambda x, weight, bias, **options: ops.layer_norm(x, weight, bias, **options),
    "rms_norm": lambda x, weight, bias, **options: ops.rms_norm(x, weight, **options),
}


def results(norm, tensors, dtype, **options):
    """Outputs and gradients; x and the residual in `dtype`, weights in float32."""
    x, residual, weight, bias, *douts = tensors
    given = [t.to(dtype).requires_grad_() for t in (x, residual)]
    given += [t.clone().requires_grad_() for t in (weight, bias)]
    found = norm(given[0], *given[2:], residual=given[1], **options)
    grads = torch.autograd.grad(found, given, [d.to(dtype) for d in douts], allow_unused=True)
    return [t.float() for t in (*found, *grads) if t is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_of_any_length_are_those_of_float32_rounded(norm, dropout_p, dtype):
    for cols in (*range(1, 68), 255, 256, 257, 300, 520):
        torch.manual_seed(cols)
        x, residual, *douts = (torch.randn(3, cols).to(dtype).float() for _ in range(4))
        tensors = x, residual, 1 + torch.arange(cols) / cols, torch.arange(cols) / cols, *douts
        options = {"dropout_p": dropout_p, "seed": 5} if dropout_p else {}
        wanted = results(NORMS[norm], tensors, torch.float32, **options)
        got = results(NORMS[norm], tensors, dtype, **options)
        eps = torch.finfo(dtype).eps  # h is rounded to dtype, which few columns make much of
        for g, w in zip(got, wanted, strict=True):
            assert (g - w).abs().max() <= 4 * eps * max(1.0, w.abs().max().item()), cols


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, -0x400000])
@pytest.mark.parametrize("norm", NORMS)
def test_a_weight_that_is_nan_of_any_bits_makes_its_column_nan(norm, bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for column in (0, 1, 9, 30, 40):
        weight = torch.ones(41)
        weight[column] = nan
        x = torch.randn(3, 41).bfloat16().requires_grad_()
        y = NORMS[norm](x, weight, None)
        assert (y.isnan() == weight.isnan()).all()
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert dx.isnan().all()
