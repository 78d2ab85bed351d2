"""Rows longer than the largest tile of Triton's row kernels: shown on small ones, with small tiles."""

import pytest
import torch

from fastlm import ops
from fastlm.testing import ptxsim
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import verdicts

pytest.importorskip("triton")
from fastlm_triton import _norms, softmax  # noqa: E402
from fastlm_triton._config import Config  # noqa: E402

NORMS = ("odd", "float32-parameters", "residual", "residual-dropout", "extreme", "nan", "packed-slice")
ROWS = {
    "layer_norm": NORMS,
    "rms_norm": ("offset", "float32-weight", *NORMS[:1], *NORMS[2:]),
    "softmax": (
        "odd",
        "causal",
        "left-padding",
        "all-masked-row",
        "mask-sliced",
        "only-minus-infinity",
        "nan",
    ),
}


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, cases in ROWS.items() for c in cases])
def test_rows_of_several_tiles_are_as_right_as_the_reference(monkeypatch, name, case):
    def two_warps(arch, *sizes):
        return Config((1, 16), warps=2)

    for config in ("norm_forward_config", "norm_backward_config"):
        monkeypatch.setattr(_norms, config, two_warps)
    monkeypatch.setattr(_norms, "elementwise_config", lambda arch, *sizes: Config((4, 16), warps=2))
    monkeypatch.setattr(softmax, "softmax_config", two_warps)
    declared, differentiable = cases_of(name)
    inputs = next(c for c in declared if c.name == case).inputs
    draws = [inputs(Draw(seed, torch.bfloat16)) for seed in range(3)]
    with ptxsim.device("sm_80"):
        found = verdicts(getattr(ops, name), draws, differentiable, "triton")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_norm_of_which_only_h_is_used_passes_its_gradient_on(name):
    x, residual = (torch.randn(5, 24, requires_grad=True) for _ in range(2))
    with ptxsim.device("sm_80"):
        _, h = getattr(ops, name)(x, residual=residual, dropout_p=0.5, seed=3, backend="triton")
        dx, dresidual = torch.autograd.grad(h.sum(), (x, residual))
    assert torch.equal(dresidual, torch.ones_like(x))
    assert torch.equal(dx, 2.0 * (h != residual))
