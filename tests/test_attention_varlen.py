"""attention_varlen is attention of each sequence, whatever lies beside it; what it does with bad starts."""

import pytest
import torch
from native_backends import BACKENDS

from fastlm._op import OPS
from fastlm.ops import AttentionOutput, attention, attention_varlen
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import KernelCalls, judge, leaves, run

CASES = {case.name: case for case in cases_of("attention_varlen")[0]}
Q_LENGTHS, K_LENGTHS = (17, 0, 1, 30, 5), (8, 3, 19, 41, 0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def starts(*lengths):
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def drawn(q_lengths=Q_LENGTHS, k_lengths=K_LENGTHS, heads=4, kv_heads=2, dim=20, seed=0):
    """q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k."""
    d = Draw(seed, torch.float32)
    q = d.normal(sum(q_lengths), heads, dim)
    k, v = (d.normal(sum(k_lengths), kv_heads, dim) for _ in range(2))
    cu = starts(*q_lengths)
    cu_k = cu if k_lengths is q_lengths else starts(*k_lengths)
    return q, k, v, cu, cu_k, max(q_lengths), max(k_lengths)


def assert_as_right(packed, apart, *lengths):
    """packed(q, k, v) is as right as apart(q, k, v): six draws of tensors judged as one sample."""
    found = []
    for seed in range(6):
        inputs, cotangents = dict(zip("qkv", drawn(*lengths, seed=seed), strict=False)), []
        got = run(packed, leaves(inputs, tuple("qkv")), cotangents)
        low = run(apart, leaves(inputs, tuple("qkv")), cotangents)
        found.append((got, low, run(apart, leaves(inputs, tuple("qkv"), torch.float64), cotangents)))
    names = found[0][0]
    verdicts = [judge(n, *(torch.stack([f[i][n] for f in found]) for i in range(3))) for n in names]
    assert len(verdicts) == 5 and all(v.ratio <= 1 for v in verdicts), "\n".join(map(str, verdicts))


def each(q, k, v, cu_q, cu_k, max_q, max_k, backend, **options):
    """(out, lse) of attention, sequence by sequence, in varlen's shapes."""
    found = []
    for b in range(len(cu_q) - 1):
        rows, cols = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        parts = (t.transpose(0, 1)[None] for t in (q[rows], k[cols], v[cols]))
        own = {n: o[b : b + 1] if n == "alibi_slopes" and o.dim() == 2 else o for n, o in options.items()}
        found.append(attention(*parts, backend=backend, return_lse=True, **own))
    return torch.cat([f.out[0].transpose(0, 1) for f in found]), torch.cat([f.lse[0] for f in found], 1)


SLOPES = torch.tensor([0.5, 0.1, 0.0, 1.5])
OPTIONS = {
    "plain": {},
    "top-left": {"causal": "top_left"},
    "bottom-right": {"causal": "bottom_right"},
    "window": {"window": (4, 2)},
    "causal-window": {"window": (9, None), "causal": "bottom_right"},
    "softcap": {"softcap": 0.7},
    "scale": {"scale": 0.9},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi-top-left": {"alibi_slopes": SLOPES * torch.arange(5.0)[:, None], "causal": "top_left"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_sequence_gets_what_attention_gives_it(backend, options):
    lengths = drawn()[3:]

    def packed(q, k, v):
        return attention_varlen(q, k, v, *lengths, backend=backend, return_lse=True, **options)

    assert_as_right(packed, lambda q, k, v: each(q, k, v, *lengths, "reference", **options))


def pad(t, lengths, longest):
    """[T,H,D] as [B,H,longest,D]."""
    rows = [torch.nn.functional.pad(s, (0, 0, 0, 0, 0, longest - len(s))) for s in t.split(list(lengths))]
    return torch.stack(rows).transpose(1, 2)


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.4, "seed": -3}, {"dropout_p": 0.4, "seed": 9, "causal": True}]
)
def test_packed_equals_padded_with_dropout_and_gradients(backend, options):
    lengths = (17, 3, 1, 30, 5)
    cu, longest = starts(*lengths), max(lengths)
    kv_lengths = torch.tensor(lengths, dtype=torch.int32)

    def padded(q, k, v):
        parts = (pad(t, lengths, longest) for t in (q, k, v))
        out, lse = attention(*parts, kv_lengths=kv_lengths, backend="reference", return_lse=True, **options)
        rows = [(out[b, :, :n], lse[b, :, :n]) for b, n in enumerate(lengths)]
        return torch.cat([o.transpose(0, 1) for o, _ in rows]), torch.cat([s for _, s in rows], 1)

    def packed(q, k, v):
        shape = cu, cu, longest, longest
        return attention_varlen(q, k, v, *shape, backend=backend, return_lse=True, **options)

    assert_as_right(packed, padded, lengths, lengths)


def test_the_dropout_mask_is_bit_for_bit_the_padded_ones(backend):
    lengths = (9, 30, 4)
    q, k, _, cu, _, longest, _ = drawn(lengths, lengths, kv_heads=4)
    v = torch.cat([torch.eye(n, 30) for n in lengths])[:, None].expand(-1, 4, -1)
    options = {"dropout_p": 0.5, "seed": 2**40 + 7}
    weights = attention_varlen(q, k, v, cu, cu, longest, longest, backend=backend, **options)  # key by key
    zeros = torch.zeros(3, 4, 30, 8)
    dense = attention(zeros, zeros, torch.eye(30).expand(3, 4, 30, 30), backend="reference", **options)
    for b, n in enumerate(lengths):
        own = weights[cu[b] : cu[b + 1], :, :n].transpose(0, 1)
        assert torch.equal(own != 0, dense[b, :, :n, :n] != 0)


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_nan_does_not_reach_a_neighbour(backend, poisoned):
    lengths = (41, 1, 30)
    q, k, v, cu, *rest = drawn(lengths, lengths)
    rows = slice(cu[poisoned], cu[poisoned + 1])
    for t in (q, k, v):
        t[rows] = float("nan")
        t.requires_grad_()
    out, lse = attention_varlen(q, k, v, cu, *rest, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    for t in (out, lse.t(), *gradients):
        assert t[rows].isnan().any()
        rest = torch.cat([t[: rows.start], t[rows.stop :]])
        assert rest.isfinite().all() and rest.any()


def test_sequences_without_queries_or_keys_are_zeros(backend):
    q, k, v, *lengths = drawn((3, 0, 4), (0, 5, 2))
    for t in (q, k, v):
        t.requires_grad_()
    out, lse = attention_varlen(q, k, v, *lengths, return_lse=True, backend=backend)
    assert not out[:3].any() and (lse[:, :3] == -torch.inf).all() and out[3:].any(-1).all()
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, 3:].sum(), (q, k, v))
    assert not dq[:3].any() and not dk[:5].any() and not dv[:5].any()
    assert dq[3:].any(-1).all() and dk[5:].any(-1).all() and dv[5:].any(-1).all()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_tokens_at_all_work(backend, lengths):
    cu = starts(*lengths)
    q, k, v = (torch.randn(0, 2, 8, requires_grad=True) for _ in range(3))
    out, lse = attention_varlen(q, k, v, cu, cu, 0, 0, causal=True, return_lse=True, backend=backend)
    assert out.shape == (0, 2, 8) and lse.shape == (2, 0)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [(0, 2, 8)] * 3


def test_return_lse_names_its_parts(backend):
    q, k, v, *lengths = drawn()
    found = attention_varlen(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), *lengths, return_lse=True, backend=backend
    )
    assert isinstance(found, AttentionOutput)
    assert found.out.dtype == torch.bfloat16 and found.out.is_contiguous()
    assert found.lse.dtype == torch.float32 and found.lse.shape == (4, sum(Q_LENGTHS))


BAD_STARTS = {
    "ends early": [0, 5, 9],
    "starts late": [4, 7, 12],
    "decreases": [0, 9, 4, 12],
    "ends late": [0, 5, 4000],
    "negative": [-7, 5, 12],
    "all past the end": [50, 60],
}


def unchecked(q, k, v, cu, max_q, backend):
    """What the op does where values cannot be looked at."""
    check = OPS["attention_varlen"].check
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlm._ops._check.has_values", lambda t: False)
        args = check(q, k, v, cu, cu, max_q, max_q, True, None, None, 0.0, None, 0.0, None, True)
    return OPS["attention_varlen"](backend, args)


def judge_bad_starts(backend, name):
    """Fails unless what is of no sequence is 0, and nothing outside the tensors, which is NaN, is read."""
    cu = torch.tensor(BAD_STARTS[name], dtype=torch.int32)
    around = [torch.full((36, 2, 8), float("nan")) for _ in range(3)]
    for t in around:
        t[12:24] = torch.randn(12, 2, 8)
    q, k, v = (t[12:24].requires_grad_() for t in around)
    out, lse = unchecked(q, k, v, cu, 12, backend)
    gradients = torch.autograd.grad(out.square().sum() + lse.exp().sum(), (q, k, v))
    assert out.isfinite().all() and not lse.isnan().any() and all(g.isfinite().all() for g in gradients)
    if name in ("ends early", "starts late"):
        outside = torch.ones(12, dtype=torch.bool)
        outside[max(cu[0], 0) : cu[-1]] = False
        assert not out[outside].any() and out[~outside].any(-1).all()
        assert (lse[:, outside] == -torch.inf).all() and lse[:, ~outside].isfinite().all()
        assert not any(g[outside].any() for g in gradients)


@pytest.mark.parametrize("name", BAD_STARTS)
def test_bad_starts_leave_nothing_uninitialised_and_reach_nothing_outside(backend, name):
    judge_bad_starts(backend, name)


def test_compiled_starts_that_end_early_give_zeros_behind_them():
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)

    def call(q, k, v, cu):
        return attention_varlen(q, k, v, cu, cu, 5, 5, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, cu)
    assert torch.equal(out[:9], call(q[:9], k[:9], v[:9], cu)) and not out[9:].any()


def test_slices_of_a_packed_projection_are_read_in_place():
    q, k, v = torch.randn(64, 3, 4, 16).unbind(1)
    cu = starts(40, 24)

    def allocated(*tensors):
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            attention_varlen(*tensors, cu, cu, 40, 40, backend="cpu")
        events = profile.kineto_results.events()
        return sorted(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)

    in_place = allocated(q, k, v)
    assert in_place == allocated(*(t.contiguous() for t in (q, k, v)))
    assert in_place[-1] == 64 * 4 * 16 * 4  # out, the largest


def test_offsets_past_two_to_the_31_are_followed():
    far = 2**29 + 7  # of tokens: the last one starts at element 5 * far, past 2^31
    storage = torch.empty(
        5 * far + 64, dtype=torch.bfloat16
    )  # address space: only what is written gets memory
    wide = storage.as_strided((6, 1, 8), (far, 8, 1))
    near = torch.randn(6, 1, 8).bfloat16()
    wide.copy_(near)
    cu = starts(2, 4)
    with KernelCalls() as calls:
        got = attention_varlen(wide, wide, wide, cu, cu, 4, 4, backend="cpu")
    assert calls.names == ["attention_varlen.cpu"]
    assert torch.equal(got, attention_varlen(near, near, near, cu, cu, 4, 4, backend="cpu"))


def test_a_long_sequence_among_short_ones_is_cut_and_every_thread_count_gives_the_same_bits():
    lengths = (3, 600, 2)
    q, k, v, *rest = drawn(lengths, lengths, heads=1, kv_heads=1, dim=16)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            inputs = leaves({"q": q, "k": k, "v": v}, tuple("qkv"))
            found.append(run(lambda q, k, v: attention_varlen(q, k, v, *rest), inputs, []))
    finally:
        torch.set_num_threads(threads)
    assert len(found[0]) == 4 and all(torch.equal(f[n], found[0][n]) for f in found for n in f)
