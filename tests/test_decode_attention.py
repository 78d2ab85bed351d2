"""decode_attention is attention over what the cache holds, wherever it lies and however it is stored."""

import math

import pytest
import torch
from decoding import decode_inputs, lengths_of, running

from fastlm._op import OPS
from fastlm.ops import AttentionOutput, append_kv, attention, decode_attention
from fastlm.testing.cases import DTYPES, Draw, cases_of
from fastlm.testing.cases.decode_attention import paged, with_int8
from fastlm.testing.compare import KernelCalls, judge, leaves

BACKENDS = (*OPS["decode_attention"].backends, "reference")
CASES = {case.name: case for case in cases_of("decode_attention")[0]}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running(request.param):
        yield request.param


def _as_attention(inputs, b, dtype=None, **options):
    """Sequence b of whole caches through attention's reference, causal from the bottom right."""
    n = inputs["kv_lengths"][b]
    q, k, v = inputs["q"][b : b + 1], inputs["k_cache"][b : b + 1, :, :n], inputs["v_cache"][b : b + 1, :, :n]
    q, k, v = (t.to(dtype or t.dtype) for t in (q, k, v))
    return attention(q, k, v, causal="bottom_right", return_lse=True, backend="reference", **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": (5, None)}, {"softcap": 1.1, "scale": 0.7}, {"alibi_slopes": torch.rand(6)}],
    ids=["plain", "window", "softcap", "alibi"],
)
@pytest.mark.parametrize("queries", [1, 4])
def test_it_is_causal_attention_over_the_first_tokens_of_the_cache(backend, queries, options):
    inputs = decode_inputs((33, 20, 4), queries=queries, heads=6, slots=40, dim=20)
    with KernelCalls() as calls:
        got = decode_attention(**inputs, **options, return_lse=True, backend=backend)
    assert calls.names == ([] if backend == "reference" else [f"decode_attention.{backend}"])
    for b in range(3):
        wide = {n: o.double() if isinstance(o, torch.Tensor) else o for n, o in options.items()}
        low, ref = _as_attention(inputs, b, **options), _as_attention(inputs, b, torch.float64, **wide)
        for name, g, lo, r in zip(("out", "lse"), got, low, ref, strict=True):
            assert (found := judge(name, g[b : b + 1], lo, r)).ratio <= 1, found


def test_reference_is_the_formula_computed_scalar_by_scalar():
    inputs = decode_inputs((7, 2), queries=3, dtype=torch.float64)
    slopes = torch.rand(4, dtype=torch.float64)
    options = {"scale": 0.6, "softcap": 0.8, "window": (3, None), "alibi_slopes": slopes}
    inputs = paged(None, inputs, 5)
    out, lse = decode_attention(**inputs, **options, return_lse=True, backend="reference")
    for b, h, i in ((b, h, i) for b in range(2) for h in range(4) for i in range(3)):
        own, scores, values = inputs["kv_lengths"][b].item() - 3 + i, [], []
        for j in range(max(0, own - 3), own + 1):
            page, at = inputs["block_table"][b, j // 5], (h // 2, j % 5)
            product = sum((inputs["q"][b, h, i] * inputs["k_cache"][page][at]).tolist())
            scores.append(0.8 * math.tanh(0.6 * product / 0.8) - slopes[h].item() * (own - j))
            values.append(inputs["v_cache"][page][at])
        total = math.log(sum(map(math.exp, scores))) if scores else -math.inf
        row = sum(math.exp(s - total) * v for s, v in zip(scores, values, strict=True))
        assert lse[b, h, i].item() == pytest.approx(total, rel=1e-12)
        assert out[b, h, i].tolist() == pytest.approx(row.tolist() if scores else [0.0] * 8, rel=1e-12)


@pytest.mark.parametrize("name", ["int8", "int8-odd", "int8-gqa"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_attention_over_the_dequantised_cache(backend, dtype, name):
    inputs = CASES[name].inputs(Draw(0, dtype)) | {"return_lse": True}
    got = decode_attention(**inputs, backend=backend)
    wide = leaves(inputs, (), torch.float64)
    for side in ("k", "v"):
        wide[f"{side}_cache"] = wide[f"{side}_cache"] * wide.pop(f"{side}_scale")[..., None]
    ref = decode_attention(**wide)
    for name, g, r in zip(("out", "lse"), got, ref, strict=True):
        low = r.float().to(g.dtype)
        assert (found := judge(name, g, low, r)).ratio <= (1 if dtype != torch.float32 else 8), found


def test_int8_costs_no_more_than_the_rounding_of_keys_and_values_can(backend):
    inputs = decode_inputs((40, 25), queries=2, slots=40, dim=32)
    k, v = inputs["k_cache"], inputs["v_cache"]
    small = {n: torch.zeros(t.shape, dtype=torch.int8) for n, t in (("k_cache", k), ("v_cache", v))}
    small |= {n: torch.zeros(t.shape[:3]) for n, t in (("k_scale", k), ("v_scale", v))}
    append_kv(k, v, kv_lengths=lengths_of(0, 0), **small)
    exact = decode_attention(**inputs, backend=backend)
    got = decode_attention(**inputs | small, backend=backend)
    score = (inputs["q"].abs().sum(-1).max() * small["k_scale"].max() / 2 * 32**-0.5).item()
    bound = math.expm1(2 * score) * v.abs().max() + small["v_scale"].max() / 2
    assert 0 < (got - exact).abs().max() < bound < 1


def _steps(backend, compiled=False, page=None, prompt=11, steps=5):
    """What a generate loop computes: the prompt at once, then token by token; and all of it by attention."""
    d, total = Draw(0, torch.float32), prompt + steps
    q, k, v = d.normal(2, 6, total, 16), d.normal(2, 2, total, 16), d.normal(2, 2, total, 16)
    caches = {
        "k_cache": torch.full((2, 2, 32, 16), torch.nan),
        "v_cache": torch.full((2, 2, 32, 16), torch.nan),
    }
    if page is not None:
        caches = paged(None, caches, page)

    def step(q, k, v, lengths):
        append_kv(k, v, kv_lengths=lengths, **caches, backend=backend)
        lengths = lengths + q.shape[2]
        return decode_attention(q, kv_lengths=lengths, **caches, backend=backend), lengths

    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend=compiled)
    found, lengths, ends = [], lengths_of(0, 0), [0, *range(prompt, total + 1)]
    for begin, end in zip(ends, ends[1:], strict=False):
        out, lengths = step(*(t[:, :, begin:end] for t in (q, k, v)), lengths)
        found.append(out)
    low, ref = (
        attention(*(t.to(dtype) for t in (q, k, v)), causal=True, backend="reference")
        for dtype in (torch.float32, torch.float64)
    )
    return torch.cat(found, 2), low, ref


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("compiled", [False, "aot_eager"])
def test_prefill_and_single_steps_give_what_attention_over_the_whole_gives(backend, compiled, page):
    found = judge("out", *_steps(backend, compiled, page))
    assert found.ratio <= 1, found


def test_inductor_compiles_a_whole_step():
    found = judge("out", *_steps("cpu", "inductor"))
    assert found.ratio <= 1, found


@pytest.mark.parametrize("name", ["odd", "everything", "int8-paged", "no-slots", "alibi-batch"])
def test_raw_kernel_passes_opcheck(name):
    optional = dict.fromkeys(("block_table", "k_scale", "v_scale", "scale", "window", "alibi_slopes"))
    inputs = {**optional, "softcap": 0.0, "return_lse": False, **CASES[name].inputs(Draw(0, torch.float32))}
    op = OPS["decode_attention"]
    torch.library.opcheck(op.forward["cpu"], op.check(**inputs))


def test_autocast_casts_the_query_and_never_the_cache(backend):
    inputs = decode_inputs(dtype=torch.bfloat16)
    want = decode_attention(**inputs, backend=backend)
    with torch.autocast("cpu", torch.float16):
        got = decode_attention(**inputs | {"q": inputs["q"].float()}, backend=backend)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)
    with torch.autocast("cpu", torch.float16):
        small = with_int8(Draw(0, torch.float32), decode_inputs())
        assert decode_attention(**small, backend=backend).dtype == torch.float32


def test_outputs_keep_the_heads_of_a_token_side_by_side(backend):
    result = decode_attention(
        **decode_inputs(queries=3, dtype=torch.bfloat16), return_lse=True, backend=backend
    )
    assert isinstance(result, AttentionOutput) and result.out.transpose(1, 2).is_contiguous()
    assert result.lse.dtype == torch.float32 and result.lse.shape == (2, 4, 3)
