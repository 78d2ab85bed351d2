"""Words for bad input to the attention ops: each function returns what is fine, in the form kernels take."""

from itertools import pairwise

import torch
from torch import Tensor

from . import _check

CAUSAL = (False, True, "top_left", "bottom_right")


def _alike(op: str, q, k, v, axes: tuple[str, ...]) -> None:
    """q, k and v must have these axes, the last one not empty, and one dtype and device."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check.floating(op, name, t)
        if t.dim() != len(axes) or t.shape[-1] == 0:
            raise ValueError(f"{op}: {name} must be [{', '.join(axes)}] with dim > 0, got {_check.got(t)}")
        if t.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must be {q.dtype} as q, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device} as q, got {_check.got(t)}")


def packed_heads(op: str, q, k, v) -> None:
    """The heads q [T,H,D], k [Tk,Hkv,D] and v [Tk,Hkv,Dv] must agree; Hkv divides H."""
    _alike(op, q, k, v, ("tokens", "heads", "dim"))
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{op}: k must have q's dim, q being {tuple(q.shape)}, got {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: k must have heads that divide q's {q.shape[1]}, got {k.shape[1]}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{op}: v must have k's tokens and heads {tuple(k.shape[:2])}, got {tuple(v.shape)}")


def heads(op: str, q, k, v) -> None:
    """The heads q [B,H,Sq,D], k [B,Hkv,Sk,D] and v [B,Hkv,Sk,Dv] must agree; Hkv divides H."""
    _alike(op, q, k, v, ("batch", "heads", "seq", "dim"))
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: k must have q's batch and dim, q being {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: k must have heads that divide q's {q.shape[1]}, got {k.shape[1]}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{op}: v must have k's batch, heads and seq {tuple(k.shape[:3])}, got {tuple(v.shape)}"
        )


def diagonal(op: str, causal, window, queries: int, keys: int) -> tuple[int, int, int]:
    """(offset, left, right): query i sees keys i + offset - left to i + offset + right; -1 is unlimited."""
    _causal(op, causal)
    if causal is True and queries != keys:
        raise ValueError(
            f"{op}: causal must be 'top_left' (first query beside first key) or 'bottom_right' (last beside"
            f" last) where queries and keys differ in number, got True with {queries} and {keys}"
        )
    left, right = _sides(op, window)
    return 0 if causal == "top_left" else keys - queries, left, 0 if causal else right


def packed_diagonal(op: str, causal, window, same: bool) -> tuple[bool, int, int]:
    """(top_left, left, right) of every sequence; same: its queries and keys are certainly as many."""
    _causal(op, causal)
    if causal is True and not same:
        raise ValueError(
            f"{op}: causal must be 'top_left' (first query beside first key) or 'bottom_right' (last beside"
            f" last) unless cu_seqlens_q is cu_seqlens_k, one and the same tensor, got True with two"
        )
    left, right = _sides(op, window)
    return causal == "top_left", left, 0 if causal else right


def _causal(op: str, causal) -> None:
    if not isinstance(causal, bool | str) or causal not in CAUSAL:
        raise ValueError(f"{op}: causal must be one of {', '.join(map(repr, CAUSAL))}, got {causal!r}")


def _sides(op: str, window) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"{op}: window must be (left, right) or None, got {window!r}")
    for side in window:
        if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < 0):
            raise ValueError(f"{op}: window must hold counts of keys, or None for no limit, got {window!r}")
    return -1 if window[0] is None else window[0], -1 if window[1] is None else window[1]


def mask(op: str, mask, q: Tensor, shape: tuple) -> Tensor | None:
    """The mask as a view of `shape` [B,H,Sq,Sk]; it must be boolean and broadcast to that."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be boolean, True = attend (what is added is the bias), got {kind}")
    _broadcast(op, "mask", mask, q, shape)
    return mask.expand(shape)


def bias(op: str, bias, q: Tensor, shape: tuple) -> Tensor | None:
    """The bias as a view of 4 dimensions; it must be floating and broadcast to `shape`."""
    if bias is None:
        return None
    _check.floating(op, "bias", bias)
    if bias.dtype != q.dtype and bias.dtype != torch.float32:
        raise TypeError(f"{op}: bias must be {q.dtype} as q or float32, got {bias.dtype}")
    _broadcast(op, "bias", bias, q, shape)
    return bias[(None,) * (4 - bias.dim())]


def _broadcast(op: str, name: str, t: Tensor, q: Tensor, shape: tuple) -> None:
    fits = t.dim() <= 4 and all(a in (1, b) for a, b in zip(t.shape, shape[4 - t.dim() :], strict=True))
    if not fits or t.device != q.device:
        wanted = f"broadcast to [batch, heads, queries, keys] {tuple(shape)} on {q.device}"
        raise ValueError(f"{op}: {name} must {wanted}, got {_check.got(t)}")


def lengths(op: str, lengths, q: Tensor, keys: int) -> Tensor | None:
    """kv_lengths must be int32 [B], each in [0, keys]."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int32:
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{op}: kv_lengths must be an int32 tensor, got {kind}")
    if lengths.dim() != 1 or lengths.shape[0] != q.shape[0] or lengths.device != q.device:
        got = _check.got(lengths)
        raise ValueError(f"{op}: kv_lengths must have shape ({q.shape[0]},) on {q.device}, got {got}")
    if _check.has_values(lengths) and bool(((lengths < 0) | (lengths > keys)).any()):
        raise ValueError(f"{op}: kv_lengths must be in [0, {keys}], got {lengths.tolist()}")
    return lengths


def starts(op: str, side: str, starts, longest, tokens: int, q: Tensor) -> None:
    """cu_seqlens_<side> must be int32 [B+1], from 0 up to `tokens`, no step above max_<side> = `longest`."""
    name, limit = f"cu_seqlens_{side}", f"max_{side}"
    if not isinstance(starts, Tensor) or starts.dtype != torch.int32:
        kind = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        raise TypeError(f"{op}: {name} must be an int32 tensor, got {kind}")
    if starts.dim() != 1 or starts.shape[0] == 0 or starts.device != q.device:
        raise ValueError(f"{op}: {name} must be [sequences + 1] on {q.device}, got {_check.got(starts)}")
    if not isinstance(longest, int | torch.SymInt) or isinstance(longest, bool):
        raise TypeError(f"{op}: {limit} must be an int, got {type(longest).__name__}")
    if longest < 0:
        raise ValueError(f"{op}: {limit} must not be negative, got {longest}")
    if not _check.has_values(starts):
        return
    values = starts.tolist()  # by tensor operations a small call's check takes twice as long
    if values[0] != 0 or values[-1] != tokens:
        got = f"{values[0]} to {values[-1]}"
        raise ValueError(f"{op}: {name} must go from 0 to the {tokens} tokens, got {got}")
    lengths = [end - start for start, end in pairwise(values)]
    least, most = min(lengths, default=0), max(lengths, default=0)
    if least < 0:
        raise ValueError(f"{op}: {name} must not decrease, got a step of {least}")
    if most > longest:
        raise ValueError(f"{op}: {limit} must be at least the longest sequence's {most}, got {longest}")


def score_options(op: str, scale, dim: int, softcap, return_lse) -> tuple[float, float]:
    """(scale, softcap): finite numbers, softcap not negative; return_lse must be a bool."""
    scale = dim**-0.5 if scale is None else _check.number(op, "scale", scale)
    softcap = _check.number(op, "softcap", softcap)
    if softcap < 0:
        raise ValueError(f"{op}: softcap must not be negative (0 is none), got {softcap}")
    if not isinstance(return_lse, bool):
        raise TypeError(f"{op}: return_lse must be a bool, got {return_lse!r}")
    return scale, softcap


def slopes(op: str, slopes, q: Tensor, batch: int, heads: int) -> Tensor | None:
    """The alibi slopes as a view [B,H] without a gradient; float32, or float64 beside a float64 q."""
    if slopes is None:
        return None
    _check.floating(op, "alibi_slopes", slopes)
    if slopes.dtype != torch.float32 and not slopes.dtype == q.dtype == torch.float64:
        raise TypeError(f"{op}: alibi_slopes must be float32, got {slopes.dtype}")
    if tuple(slopes.shape) not in ((heads,), (batch, heads)) or slopes.device != q.device:
        wanted = f"shape ({heads},) or ({batch}, {heads}) on {q.device}"
        raise ValueError(f"{op}: alibi_slopes must have {wanted}, got {_check.got(slopes)}")
    return slopes.detach().expand(batch, heads)
