"""The inputs that the tests of decode_attention share."""

from contextlib import nullcontext

import torch

from fastlm._op import OPS
from fastlm.testing import ptxsim
from fastlm.testing.cases import Draw, cases_of


def running(backend):
    """A context in which it takes CPU tensors: kernels for GPUs are simulated."""
    return ptxsim.device("sm_80") if backend in ("cuda", "triton") else nullcontext()


def raw_arguments(name, dtype):
    """The raw op's arguments of a case."""
    case = next(c for c in cases_of("decode_attention")[0] if c.name == name)
    inputs = case.inputs(Draw(0, dtype))
    names = ("block_table", "k_scale", "v_scale", "scale", "window", "softcap", "alibi_slopes", "return_lse")
    defaults = {"softcap": 0.0, "return_lse": False}
    options = [inputs.get(n, defaults.get(n)) for n in names]
    tensors = [inputs[n] for n in ("q", "k_cache", "v_cache", "kv_lengths")]
    return list(OPS["decode_attention"].check(*tensors, *options))


def lengths_of(*lengths):
    """kv_lengths, int32 [batch]."""
    return torch.tensor(lengths, dtype=torch.int32)


def decode_inputs(lengths=(9, 4), queries=1, heads=4, kv_heads=2, slots=12, dim=8, dtype=torch.float32):
    """Random q and contiguous caches, and the lengths."""
    d, batch = Draw(0, dtype), len(lengths)
    q = d.normal(batch, heads, queries, dim)
    k, v = d.normal(batch, kv_heads, slots, dim), d.normal(batch, kv_heads, slots, dim)
    return {"q": q, "k_cache": k, "v_cache": v, "kv_lengths": lengths_of(*lengths)}


def check_tokens_without_a_slot_are_dropped(backend, paged, quantised, far):
    """append_kv's tokens past the cache, before it and without a page are written nowhere, the others are.

    far: a length that no cache has.
    """
    k, v = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4, 8)
    dtype = torch.int8 if quantised else torch.float32
    caches = [torch.full((3, 2, 6, 8), 7, dtype=dtype) for _ in range(2)]
    scales = [torch.full((3, 2, 6), 7.0) for _ in range(2)] if quantised else [None, None]
    table = torch.tensor([[1], [3], [-1]], dtype=torch.int32) if paged else None  # there are three pages
    written = {0: (1 if paged else 0, slice(4, 6), slice(0, 2))}  # sequence -> page, slots, tokens
    if not paged:
        written[1] = (1, slice(0, 2), slice(2, 4))
    with running(backend):
        OPS["append_kv"].forward[backend](k, v, *caches, lengths_of(4, -2, far), table, *scales)
    for x, cache, scale in zip((k, v), caches, scales, strict=True):
        wanted, untouched = torch.full((3, 2, 6, 8), 7.0), torch.ones(3, 2, 6, dtype=torch.bool)
        for sequence, (page, slots, tokens) in written.items():
            wanted[page, :, slots] = x[sequence, :, tokens]
            untouched[page, :, slots] = False
        assert (cache[untouched] == 7).all() and (scale is None or (scale[untouched] == 7).all())
        got = cache.float() * scale[..., None] if quantised else cache
        assert torch.allclose(got[~untouched], wanted[~untouched], atol=0.02 if quantised else 0)
