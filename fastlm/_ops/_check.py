"""Words for bad input: each function returns what is fine and raises `op: argument must ..., got ...`."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_STRIDED = torch.strided
_INF = float("inf")
_NUMBER = (float, int)  # written float | int it would be made anew at every call


def got(value) -> str:
    """A value as an error message shows it."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    return repr(value)


def floating(op: str, name: str, t) -> None:
    """t must be a dense floating tensor: no nested, quantised, sparse or complex one."""
    if isinstance(t, Tensor) and t.dtype in FLOATING and t.layout is _STRIDED and not t.is_nested:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {t.dtype}")
    kind = "nested" if t.is_nested else t.layout
    raise TypeError(f"{op}: {name} must be a dense tensor, got a {kind} one")


def like(op: str, name: str, t, other: Tensor, other_name: str) -> None:
    """t must be a dense tensor of other's dtype, shape and device."""
    floating(op, name, t)
    if t.dtype != other.dtype or t.shape != other.shape or t.device != other.device:
        raise ValueError(f"{op}: {name} must be like {other_name}, {got(other)}, got {got(t)}")


def parameter(op: str, name: str, t, size: int, x: Tensor) -> None:
    """t must be None or a vector of `size` on x's device, in x's dtype or (x being half) float32."""
    if t is None:
        return
    if isinstance(t, Tensor) and t.dtype is x.dtype and t.layout is _STRIDED and not t.is_nested:
        if t.shape == (size,) and (
            t.is_cpu and x.is_cpu or t.device == x.device
        ):  # is_cpu: a third of the time
            return
    floating(op, name, t)
    if t.shape != (size,) or t.device != x.device:
        raise ValueError(f"{op}: {name} must have shape ({size},) on {x.device}, got {got(t)}")
    if t.dtype is not torch.float32 and t.dtype is not x.dtype:
        raise TypeError(f"{op}: {name} must be {x.dtype} as x or float32, got {t.dtype}")


def weight(op: str, name: str, t, shape: tuple[int | str, ...], x: Tensor) -> None:
    """t must have `shape` (a word stands for any size) and x's dtype and device."""
    floating(op, name, t)
    fits = all(isinstance(s, str) or s == n for s, n in zip(shape, t.shape, strict=False))
    if t.dim() != len(shape) or not fits or t.device != x.device:
        words = ", ".join(map(str, shape))
        raise ValueError(f"{op}: {name} must have shape [{words}] on {x.device}, got {got(t)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must be {x.dtype} as x, got {t.dtype}")


def probability(op: str, p) -> float:
    """dropout_p must be in [0, 1)."""
    if type(p) is float and 0.0 <= p < 1.0:
        return p
    if not isinstance(p, _NUMBER) or isinstance(p, bool):
        raise TypeError(f"{op}: dropout_p must be a float, got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {p}")
    return float(p)


def number(op: str, name: str, value) -> float:
    """value must be a finite number."""
    if type(value) is float and -_INF < value < _INF:
        return value
    if not isinstance(value, _NUMBER) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -_INF < value < _INF:
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def choice(op: str, name: str, value, choices: tuple) -> None:
    """value must be one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def dropout_seed(op: str, p: float, seed, x: Tensor) -> Tensor | None:
    """The seed as int64 [1] on x's device: drawn there if None, made of an int; None where p is 0."""
    if p == 0.0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise ValueError(f"{op}: seed must be int64 of one element on {x.device}, got {got(seed)}")
        return seed.reshape(1)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: seed must be None, a 64-bit int or an int64 tensor, got {seed!r}")
    return torch.full((1,), seed, dtype=torch.int64, device=x.device)  # no copy from the host: nothing waits


def attention_mask(op: str, mask, shape: torch.Size, device: torch.device) -> Tensor:
    """The mask as a view of `shape`: it must be a dense boolean tensor that broadcasts to it."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.layout is not torch.strided:
        raise TypeError(f"{op}: mask must be a boolean tensor (True = attend), got {got(mask)}")
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > len(shape) or mask.device != device or any(m not in (1, s) for m, s in sizes):
        raise ValueError(f"{op}: mask must broadcast to {tuple(shape)} on {device}, got {got(mask)}")
    return mask.expand(shape)


def has_values(t: Tensor) -> bool:
    """Whether the numbers in t can be looked at: an eager CPU tensor, not a traced, fake or vmapped one."""
    if torch.compiler.is_compiling() or t.device.type != "cpu":
        return False
    return type(t) is Tensor and torch._C._functorch.peek_interpreter_stack() is None
