"""The references mean what torch means, and their derivatives are right in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import ops
from fastlm._op import OPS
from fastlm._philox import row_scales
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import leaves, verdicts

GRADCHECK = [
    pytest.param(n, c, id=f"{n}-{c.name}")
    for n in OPS
    for c in cases_of(n)[0]
    if cases_of(n)[1] and c.name in ("row", "odd", "plain", "residual", "residual-dropout", "dropout")
]


@pytest.mark.parametrize(("name", "case"), GRADCHECK)
def test_gradcheck_passes_in_float64(name, case):
    inputs = leaves(case.inputs(Draw(0, torch.float64)), cases_of(name)[1])
    wanted = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]

    def call(*tensors):
        return getattr(ops, name)(**inputs | dict(zip(wanted, tensors, strict=True)), backend="reference")

    torch.autograd.gradcheck(call, [inputs[k] for k in wanted], fast_mode=True)


def test_layer_norm_means_what_torch_means():
    x, w, b = torch.randn(3, 5, 40).double(), torch.randn(40).double(), torch.randn(40).double()
    torch.testing.assert_close(ops.layer_norm(x, w, b, 1e-3), F.layer_norm(x, (40,), w, b, 1e-3))


def test_dropout_keeps_the_expected_share_and_scales_it():
    y = ops.dropout_add(torch.ones(1000, 100), dropout_p=0.3, seed=9)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((y == 0).double().mean().item() - 0.3) < 4 * (0.3 * 0.7 / 1e5) ** 0.5


def test_different_seeds_and_rows_give_different_masks():
    scales = [row_scales(torch.tensor([s]), (4, 256), 0.5, torch.float32) for s in (0, 1, 1 << 40)]
    rows = torch.cat(scales)
    assert len({tuple(r.tolist()) for r in rows}) == 12


def test_a_seed_of_none_follows_torch_manual_seed():
    x = torch.ones(64)
    found = [torch.manual_seed(s) and ops.dropout_add(x, dropout_p=0.5) for s in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# At least 16 columns: a shorter row's gradient is a few rounding errors, and twice another's few is luck.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple),
    cols=st.integers(16, 200),
    offset=st.integers(0, 3),
    options=st.fixed_dictionaries(
        {"weight": st.booleans(), "bias": st.booleans(), "residual": st.booleans()}
    ),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_layer_norm_holds_for_any_shape_stride_and_option(shape, cols, offset, options, p, dtype, seed):
    d = Draw(seed % 2**31, dtype)
    x = d.slice_of((*shape, cols + offset), offset, cols)
    inputs = {"x": x, "dropout_p": p, "seed": seed, "eps": 1e-3}
    inputs |= {k: d.normal(cols) for k in ("weight", "bias") if options[k]}
    if options["residual"]:
        inputs["residual"] = d.normal(*shape, cols)
    found = verdicts(ops.layer_norm, [inputs], cases_of("layer_norm")[1], "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))
