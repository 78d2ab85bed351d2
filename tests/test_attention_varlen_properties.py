"""attention_varlen of drawn sequences, heads, options and strides, and each sequence beside attention."""

import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from fastlm.ops import attention, attention_varlen
from fastlm.testing.cases import DTYPES, Draw
from fastlm.testing.compare import verdicts

GRADIENTS = ("q", "k", "v")
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "heads outside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "packed": lambda t: torch.stack([t, t, t], 1)[:, 1],
    "columns outside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}

_length = st.integers(0, 12) | st.sampled_from([0, 1, 70])
_side = st.none() | st.integers(0, 40)
CALLS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "lengths": st.lists(st.tuples(_length, _length), max_size=5),  # queries, keys
        "heads": st.tuples(st.integers(1, 3), st.integers(1, 3)),  # kv heads, group
        "dims": st.tuples(st.integers(1, 40), st.integers(1, 40)),
        "layouts": st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
        "more": st.tuples(st.integers(0, 9), st.integers(0, 9)),  # max_q and max_k above the longest
    },
    optional={
        "causal": st.sampled_from([True, "top_left", "bottom_right"]),
        "window": st.tuples(_side, _side),
        "scale": st.sampled_from([0.3, -0.1]),
        "softcap": st.sampled_from([0.5, 5.0]),
        "alibi_slopes": st.booleans(),  # for each of the sequences
        "dropout_p": st.just(0.3),
    },
)


def _starts(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _inputs(call, d):
    call = dict(call)
    lengths, (kv_heads, group), (dim, dim_v) = call.pop("lengths"), call.pop("heads"), call.pop("dims")
    queries, keys = [n for n, _ in lengths], [n for _, n in lengths]
    starts = {"cu_seqlens_q": _starts(queries), "cu_seqlens_k": _starts(keys)}
    if call.get("causal") is True:  # takes one tensor of starts
        keys, starts["cu_seqlens_k"] = queries, starts["cu_seqlens_q"]
    maxima = (max(n, default=0) + more for n, more in zip((queries, keys), call.pop("more"), strict=True))
    heads = kv_heads * group
    shapes = (sum(queries), heads, dim), (sum(keys), kv_heads, dim), (sum(keys), kv_heads, dim_v)
    layouts = zip("qkv", call.pop("layouts"), shapes, strict=True)
    inputs = {name: LAYOUTS[layout](d.normal(*shape)) for name, layout, shape in layouts}
    inputs |= starts | dict(zip(("max_q", "max_k"), maxima, strict=True))
    if "alibi_slopes" in call:
        shape = (len(lengths), heads) if call.pop("alibi_slopes") else (heads,)
        inputs["alibi_slopes"] = d.normal(*shape, scale=0.3, dtype=torch.float32)
    if "dropout_p" in call:
        inputs["seed"] = 3
    return inputs | call | {"return_lse": True}


def _one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, alibi_slopes=None, **options):
    """(out, lse) of attention for each sequence alone, in the shapes of attention_varlen."""
    out, lse = [], []
    for b in range(len(cu_seqlens_q) - 1):
        of_q, of_k = (slice(cu[b], cu[b + 1]) for cu in (cu_seqlens_q, cu_seqlens_k))
        parts = (t.transpose(0, 1)[None] for t in (q[of_q], k[of_k], v[of_k]))
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        found = attention(*parts, alibi_slopes=slopes, **options)
        out.append(found.out[0].transpose(0, 1))
        lse.append(found.lse[0])
    return torch.cat(out), torch.cat(lse, 1)


def _packed_or_one_by_one(*, backend, **inputs):
    """On the CPU the packed kernel, which is to be judged; as the reference attention of each sequence."""
    if backend == "cpu":
        return attention_varlen(**inputs, backend=backend)
    return _one_by_one(**inputs, backend=backend)


def _assert_right(op, call):
    call = dict(call)
    dtype = call.pop("dtype")
    found = verdicts(op, [_inputs(call, Draw(seed, dtype)) for seed in range(6)], GRADIENTS, "cpu")
    assert len(found) == 5 and all(v.ratio <= 1 for v in found), "\n".join(map(str, found))


@settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(CALLS)
def test_cpu_is_as_right_as_the_reference_whatever_is_drawn(call):
    _assert_right(attention_varlen, call)


@settings(max_examples=20, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(CALLS)
def test_every_drawn_sequence_gets_what_attention_gives_it_alone(call):
    assume(call["lengths"])  # of no sequence at all there is nothing to lay side by side
    call = {n: o for n, o in call.items() if n != "dropout_p"}  # its mask depends on the sequence's number
    _assert_right(_packed_or_one_by_one, call)
