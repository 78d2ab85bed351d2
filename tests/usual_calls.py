"""A usual call of each op, and what comes of any call the usual way and the longer way, checks and all."""

from contextlib import contextmanager

import torch
from torch import Tensor

from fastlm import _load, ops
from fastlm._op import OPS

NAMES = [n for n in OPS if hasattr(_load.USUAL, n)]
SEEDED = [n for n in NAMES if "dropout_p" in OPS[n].arguments]


class Subclass(Tensor):
    """A tensor of another class."""


def usual(dtype=torch.float32) -> dict[str, dict]:
    """Arguments of one usual call of each op."""

    def t(*shape):
        return torch.randn(shape).to(dtype)

    x, cos = t(3, 16), t(4, 8)
    q, k, v = t(2, 4, 3, 8), t(2, 2, 3, 8), t(2, 2, 3, 5)
    lengths, target = torch.tensor([1, 3], dtype=torch.int32), torch.tensor([2, -100, 15])
    starts = torch.tensor([0, 1, 6], dtype=torch.int32)
    packed = {"q": t(6, 4, 8), "k": t(6, 2, 8), "v": t(6, 2, 5), "cu_seqlens_q": starts}
    caches = {"k_cache": t(2, 2, 7, 8), "v_cache": t(2, 2, 7, 5), "kv_lengths": lengths}
    return {
        "layer_norm": {"x": x, "weight": t(16), "bias": torch.randn(16), "residual": t(3, 16)},
        "rms_norm": {"x": x, "weight": t(16), "weight_offset": 1.0, "residual": t(3, 16)},
        "bias_act": {"x": x, "bias": torch.randn(16), "activation": "silu"},
        "glu": {"gate": x, "up": t(3, 16), "activation": "gelu"},
        "softmax": {"x": t(3, 3), "scale": 0.5, "causal": True},
        "cross_entropy": {"logits": x, "target": target, "label_smoothing": 0.25},
        "linear_cross_entropy": {"x": x, "weight": t(17, 16), "target": target, "bias": t(17), "z_loss": 0.1},
        "dropout_add": {"x": x, "residual": t(3, 16)},
        "rope": {"x": q, "cos": t(3, 8), "sin": cos[:3]},
        "attention": {"q": q, "k": k, "v": v, "causal": True, "kv_lengths": lengths},
        "attention_varlen": packed | {"cu_seqlens_k": starts, "max_q": 5, "max_k": 5, "causal": True},
        "decode_attention": {"q": q, **caches, "scale": 0.5},
        "append_kv": {"k": k, "v": v, **caches},
        "feed_forward": {"x": x, "w1": t(8, 16), "b1": t(8), "w2": t(5, 8), "b2": t(5), "activation": "relu"},
    }


@contextmanager
def watched(name):
    """Gives a list of whether each call of an op inside it was a usual one."""
    taken, original = [], OPS[name].usual

    def asked(*arguments):
        found = original(*arguments)
        taken.append(found is not None)
        return found

    OPS[name].usual = asked
    try:
        yield taken
    finally:
        OPS[name].usual = original


def tensors_of(value) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, laid out alike, one with a graph where the other has one."""
    alike = (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
    return (
        alike
        and type(a) is type(b)
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def copied(arguments: dict) -> dict:
    """The arguments with caches of their own, for an op that writes into them."""
    return {
        n: a.clone() if n in ("k_cache", "v_cache") and isinstance(a, Tensor) else a
        for n, a in arguments.items()
    }


def outcome(name, arguments, backend=None):
    """What a call returns, and what is in its caches then; or the class and the words of its error."""
    arguments = copied(arguments)
    try:
        found = getattr(ops, name)(**arguments, backend=backend)
    except Exception as error:
        return type(error), str(error)
    return type(found), [*tensors_of(found), *(a for n, a in arguments.items() if n.endswith("_cache"))]


def assert_same(got, wanted):
    assert got[0] is wanted[0]
    if isinstance(wanted[1], str):
        assert got[1] == wanted[1]
    else:
        assert len(got[1]) == len(wanted[1])
        assert all(map(same, got[1], wanted[1]))


def checked(name, arguments):
    """The outcome of the longer way."""
    original, OPS[name].usual = OPS[name].usual, lambda *_: None
    try:
        return outcome(name, arguments)
    finally:
        OPS[name].usual = original


def assert_unusual(name, arguments):
    """The call takes the longer way, and what comes of it is what always did."""
    with watched(name) as taken:
        got = outcome(name, arguments)
    assert taken in ([], [False])
    assert_same(got, checked(name, arguments))
