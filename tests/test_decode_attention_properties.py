"""What is true of decode_attention whatever the numbers are; drawn shapes, pages and options."""

import pytest
import torch
from decoding import decode_inputs, lengths_of, running
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastlm._op import OPS
from fastlm.ops import decode_attention
from fastlm.testing.cases import DTYPES, Draw, cases_of
from fastlm.testing.cases.decode_attention import paged, with_int8
from fastlm.testing.compare import verdicts

BACKENDS = (*OPS["decode_attention"].backends, "reference")
CASES = {case.name: case for case in cases_of("decode_attention")[0]}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running(request.param):
        yield request.param


@pytest.mark.parametrize("page", [1, 7, 16, 1000])
@pytest.mark.parametrize("name", ["odd", "pieces", "gqa", "int8-gqa"])
def test_pages_give_the_bits_of_a_whole_cache(name, page):
    whole = CASES[name].inputs(Draw(0, torch.float32)) | {"return_lse": True}
    want, got = (decode_attention(**i, backend="cpu") for i in (whole, paged(None, whole, page)))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", ["pieces", "gqa", "odd", "int8"])
def test_a_sequence_does_not_depend_on_its_neighbours(name):
    inputs = CASES[name].inputs(Draw(0, torch.float32)) | {"return_lse": True}
    together = decode_attention(**inputs, backend="cpu")
    for b in range(len(inputs["kv_lengths"])):
        one = {n: t[b : b + 1] if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
        alone = decode_attention(**one, backend="cpu")
        assert all(torch.equal(t[b : b + 1], a) for t, a in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", ["plain", "pieces", "paged", "int8"])
def test_slots_past_a_length_are_never_read(backend, name):
    inputs = CASES[name].inputs(Draw(0, torch.float32)) | {"return_lse": False}
    want = decode_attention(**inputs, backend=backend)
    poison = {n: inputs[n].clone() for n in ("k_cache", "v_cache", "k_scale", "v_scale") if n in inputs}
    table = inputs.get("block_table", torch.arange(len(want))[:, None]).tolist()
    for t in poison.values():
        size = t.shape[2]
        for b, length in enumerate(inputs["kv_lengths"].tolist()):
            for entry, page in enumerate(table[b]):
                t[page, :, max(0, length - entry * size) :] = torch.nan if t.is_floating_point() else -77
    assert torch.equal(decode_attention(**inputs | poison, backend=backend), want)


def test_bad_numbers_are_not_followed_where_they_are_not_looked_at(backend):
    inputs = decode_inputs((9, 4, 7), slots=12)
    run = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    got = run(**inputs | {"kv_lengths": lengths_of(2**30, -5, 7)}, backend=backend)
    want = decode_attention(**inputs | {"kv_lengths": lengths_of(12, 0, 7)}, backend=backend)
    assert torch.equal(got, want) and not want[1].any()
    pages = paged(None, inputs, 3)
    table = pages["block_table"].clone()
    bad, zero = table.clone(), table.clone()
    bad[0, :2], zero[0, :2] = torch.tensor([2**30, -1]), 0
    got = run(**pages | {"block_table": bad}, backend=backend)
    assert torch.equal(got, decode_attention(**pages | {"block_table": zero}, backend=backend))


@pytest.mark.parametrize("name", ["strided", "int8-strided", "packed"])
def test_views_with_contiguous_columns_are_read_in_place(name):
    inputs = CASES[name].inputs(Draw(0, torch.float32))
    assert not all(t.is_contiguous() for t in inputs.values())
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        decode_attention(**inputs, backend="cpu")
    sizes = [e.nbytes() for e in profile.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes) == inputs["q"].numel() * 4  # out, the largest


CALLS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "sizes": st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5)),  # batch, kv heads, group
        "queries": st.integers(1, 6),
        "slots": st.integers(1, 150) | st.integers(500, 1100),
        "dims": st.tuples(st.integers(1, 70) | st.just(64), st.integers(1, 70) | st.just(64)),
        "page": st.none() | st.integers(1, 200),
        "int8": st.booleans(),
    },
    optional={
        "window": st.tuples(st.integers(0, 600), st.none()),
        "softcap": st.sampled_from([0.5, 5.0]),
        "scale": st.sampled_from([0.3, -0.1]),
        "alibi_slopes": st.booleans(),
    },
)


def _drawn(call, d):
    call = dict(call)
    (batch, kv_heads, group), (dim, dim_v), slots = call.pop("sizes"), call.pop("dims"), call.pop("slots")
    inputs = {"q": d.normal(batch, kv_heads * group, call.pop("queries"), dim)}
    inputs |= {
        "k_cache": d.normal(batch, kv_heads, slots, dim),
        "v_cache": d.normal(batch, kv_heads, slots, dim_v),
    }
    inputs["kv_lengths"] = d.integers(0, slots + 1, batch, dtype=torch.int32)
    if call.pop("int8"):
        inputs = with_int8(d, inputs)
    if (page := call.pop("page")) is not None:
        inputs = paged(d, inputs, page)
    if "alibi_slopes" in call:
        shape = (batch, kv_heads * group) if call.pop("alibi_slopes") else (kv_heads * group,)
        inputs["alibi_slopes"] = d.normal(*shape, scale=0.1, dtype=torch.float32)
    return inputs | call | {"return_lse": True}


@settings(max_examples=50, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(CALLS)
def test_cpu_is_as_right_as_the_reference_whatever_is_drawn(call):
    call, dtype = dict(call), call["dtype"]
    del call["dtype"]
    found = verdicts(decode_attention, [_drawn(call, Draw(seed, dtype)) for seed in range(6)], (), "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))
