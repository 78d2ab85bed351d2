"""The CUDA kernels of attention beyond their cases: launches, bits, far rows, bad starts, planted bugs."""

import inspect
import re

import pytest
import test_attention_varlen
import torch

from fastlm import explain
from fastlm._ops.attention import CUDA_HEADS, OP, check
from fastlm.ops import attention, attention_varlen
from fastlm.testing import ptxsim
from fastlm.testing.cases import SEEDS, Draw, tiled_heads
from fastlm.testing.cases.attention import qkv
from fastlm.testing.compare import verdicts
from fastlm.testing.ptxsim import SimulationError, cuda


@pytest.fixture
def simulated():
    with ptxsim.device("sm_80"):
        yield


def launched():
    """The kernels of the last call, by name, without where they come from."""
    names = (found.kernel for found in cuda.runtime().launches)
    return [re.search(r"attention_([a-z]+)_kernel", name).group(1) for name in names]


def gradients(inputs, names="qkv", **options):
    wanted = [inputs[n].requires_grad_() for n in names]
    out = attention(**inputs, backend="cuda", **options)
    return torch.autograd.grad(out.float().square().sum(), wanted)


def test_cases_have_the_widths_that_there_are_tiles_of():
    assert tiled_heads.WIDTHS == CUDA_HEADS


@pytest.mark.parametrize(("dim", "dim_v"), [(20, 20), (64, 32), (512, 512)])
def test_other_head_dims_are_left_to_triton(simulated, dim, dim_v):
    inputs = qkv(Draw(0, torch.float16), 1, 2, 5, 5, dim, dim_v=dim_v)
    reason = explain("attention", **inputs).reasons["cuda"]
    assert "32, 64, 96, 128, 256" in reason and "triton" in reason
    with pytest.raises(NotImplementedError, match="triton takes others"):
        attention(**inputs, backend="cuda")


@pytest.mark.parametrize(("names", "kernels"), [("q", ["dq"]), ("v", ["dq", "dkv"]), ("qkv", ["dq", "dkv"])])
def test_only_kernels_run_whose_results_are_wanted(simulated, names, kernels):
    gradients(qkv(Draw(0, torch.bfloat16), 1, 2, 9, 9, 32), names)
    assert launched() == kernels


FAR = 1 << 40


@pytest.mark.parametrize(
    ("offset", "left", "right"),
    [(FAR, -1, 0), (-FAR, -1, 0), (0, FAR, FAR), (FAR, 0, 0), (1 << 30, -1, -1), (-1 << 31, 3, -1)],
)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_diagonals_that_no_sequence_reaches_hide_all_or_nothing(simulated, backend, offset, left, right):
    inputs = qkv(Draw(0, torch.float32), 1, 2, 5, 9, 32)
    options = {n: p.default for n, p in inspect.signature(attention).parameters.items() if n != "backend"}
    args = list(check(**options | inputs))
    args[7:10] = offset, left, right
    for found, expected in zip(OP.forward[backend](*args), OP.reference(*args), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_gradient_of_a_bias_takes_one_kernel_more(simulated):
    inputs = qkv(Draw(0, torch.bfloat16), 1, 2, 9, 9, 32) | {"bias": torch.randn(9, 9).bfloat16()}
    gradients(inputs, ("q", "bias"))
    assert launched() == ["dq", "dbias"]


@pytest.mark.parametrize("shape", [(3, 5), (1, 1)], ids=str)
def test_the_gradient_of_a_bias_of_40_heads_is_as_right_as_of_one(simulated, shape):
    """One block adds them up; a plain sum of 800 was 1.5 times what is allowed, on the CPU."""
    draws = []
    for seed in SEEDS[:2]:
        d = Draw(seed, torch.float32)
        draws.append(qkv(d, 2, 20, 3, 5, 32) | {"bias": d.normal(1, 1, *shape), "return_lse": True})
    found = verdicts(attention, draws, ("bias",), "cuda")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_same_bits_in_every_run(simulated, dtype):
    def run():
        inputs = qkv(Draw(0, dtype), 2, 4, 70, 70, 32, kv_heads=2)
        bias = Draw(1, dtype).normal(1, 1, 70, 1)
        return gradients(inputs | {"bias": bias}, ("q", "k", "v", "bias"), causal=True, dropout_p=0.1, seed=3)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_seed_gives_the_mask_of_the_cpu(simulated, dtype):
    q = torch.zeros(2, 3, 41, 64, dtype=dtype)
    v = torch.eye(64, dtype=dtype).expand(2, 3, 64, 64)  # out is the weights, key by key
    kept = [attention(q, v, v, dropout_p=0.4, seed=2**40 + 7, backend=b) != 0 for b in ("cuda", "cpu")]
    assert torch.equal(*kept) and 0.5 < kept[0].float().mean() < 0.7


@pytest.fixture
def far_rows():
    """[1, 1, 3, 32] in float16, 2^30 elements from row to row: memory that nobody touches costs nothing."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows = torch.empty((1 << 31) + 32, dtype=torch.float16).as_strided((1, 1, 3, 32), (32, 32, 1 << 30, 1))
    torch.utils.deterministic.fill_uninitialized_memory = fills
    return rows.copy_(torch.randn(1, 1, 3, 32))


def test_rows_past_two_to_the_31_elements_are_found(simulated, far_rows):
    near = far_rows.clone(memory_format=torch.contiguous_format)
    found = []
    for t in (far_rows, near):
        q = near.clone().requires_grad_()
        out = attention(q, t, t, backend="cuda")
        found.append((out, torch.autograd.grad(out.sum(), q)[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


BAD_STARTS = test_attention_varlen.BAD_STARTS | {"more than a warp": [0] * 40 + [12]}


def of_bad_starts(cu, longest):
    """out, lse and the gradients of 12 rows among NaN."""
    around = [torch.full((36, 2, 32), float("nan")) for _ in range(3)]
    for t in around:
        t[12:24] = torch.randn(12, 2, 32)
    q, k, v = (t[12:24].requires_grad_() for t in around)
    out, lse = test_attention_varlen.unchecked(q, k, v, torch.tensor(cu, dtype=torch.int32), longest, "cuda")
    return out, lse, torch.autograd.grad(out.square().sum() + lse.exp().sum(), (q, k, v))


@pytest.mark.parametrize("name", BAD_STARTS)
def test_bad_starts_leave_nothing_uninitialised_and_reach_nothing_outside(simulated, name):
    cu = BAD_STARTS[name]
    out, lse, found = of_bad_starts(cu, 12)
    assert out.isfinite().all() and not lse.isnan().any() and all(g.isfinite().all() for g in found)
    within = torch.zeros(12, dtype=torch.bool)
    within[max(cu[0], 0) : max(cu)] = True
    assert not out[~within].any() and (lse[:, ~within] == -torch.inf).all()
    assert out[within].any(-1).all() and lse[:, within].isfinite().all()
    assert not any(g[~within].any() for g in found)


def test_what_a_sequence_has_beyond_the_longest_is_of_none(simulated):
    out, lse, found = of_bad_starts([0, 7, 12], 5)
    assert out[:5].any(-1).all() and out[7:].any(-1).all() and not out[5:7].any()
    assert (lse[:, 5:7] == -torch.inf).all() and not any(g[5:7].any() for g in found)


def without(pattern, replacement=b"", count=1):
    """A rewrite of one kernel's PTX."""

    def rewrite(kernel, text):
        return re.sub(pattern, replacement, text, count=count)

    return rewrite


BUGS = {  # what is planted in the PTX, and what ptxsim says of it
    "no barrier": (without(rb"bar\.sync[^;]*;", count=0), "race"),
    "no wait": (without(rb"cp\.async\.wait_group\s+0;", b"cp.async.wait_group 1;", count=0), "async"),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name):
    rewrite, finding = BUGS[name]
    inputs = qkv(Draw(0, torch.bfloat16), 1, 2, 100, 100, 32)
    with ptxsim.device("sm_80", rewrite=rewrite), pytest.raises(SimulationError, match=finding):
        attention(**inputs, backend="cuda")


def test_packed_equals_dense(simulated):
    d = Draw(0, torch.bfloat16)
    q, k, v = (d.normal(150, 2, 64) for _ in range(3))
    cu = torch.tensor([0, 150], dtype=torch.int32)
    options = {"causal": True, "window": (70, None), "dropout_p": 0.2, "seed": 4, "backend": "cuda"}
    packed = attention_varlen(q, k, v, cu, cu, 150, 150, **options)
    dense = attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), **options)
    assert torch.equal(packed, dense[0].transpose(0, 1))
