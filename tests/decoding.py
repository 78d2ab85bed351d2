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
