"""rope: rotary position embedding: pairs of x's elements are turned by the angles of their position.

With rotate((a, b)) = (-b, a) of every pair: y = x * cos + rotate(x) * sin. Source: Su et al., "RoFormer:
Enhanced Transformer with Rotary Position Embedding", https://arxiv.org/abs/2104.09864.
"""

from typing import Literal

import torch
from torch import Tensor

from .._op import Op, may_be_usual
from . import _check


def reference(x, cos, sin, interleaved):
    """y in plain PyTorch; half precision is computed in float32 and rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = cos.shape[-1] // 2
    # [S, 2 half] or [B, S, 2 half] -> the same beside x's heads, which stand before S
    tables = (t.to(wide).unsqueeze(-3).split(half, -1) for t in (cos, sin))
    (cos_a, cos_b), (sin_a, sin_b) = tables
    z = x[..., : 2 * half].to(wide)
    a, b = z.unflatten(-1, (half, 2)).unbind(-1) if interleaved else z.split(half, -1)
    pairs = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    y = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((y.to(x.dtype), x[..., 2 * half :]), -1)


def _check_table(name, table, x):
    op = "rope"
    _check.floating(op, name, table)
    batch, _, seq, dim = x.shape
    fits = table.dim() in (2, 3) and table.shape[-2] == seq and 2 <= table.shape[-1] <= dim
    fits = fits and table.shape[-1] % 2 == 0 and table.shape[:-2] in ((), (1,), (batch,))
    if not fits or table.device != x.device:
        wanted = f"[{seq}, n] or [{batch}, {seq}, n] on {x.device}, n even and at most {dim}"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {_check.got(table)}")
    if table.dtype != x.dtype and table.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be {x.dtype} as x or float32, got {table.dtype}")


def check(x, cos, sin, interleaved):
    """The forward schema's arguments; raises TypeError or ValueError."""
    op = "rope"
    _check.floating(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must have shape [batch, heads, seq, dim], got {_check.got(x)}")
    _check_table("cos", cos, x)
    _check.like(op, "sin", sin, cos, "cos")
    if not isinstance(interleaved, bool):
        raise TypeError(f"{op}: interleaved must be a bool, got {type(interleaved).__name__}")
    cos, sin = (t.detach() if t.requires_grad else t for t in (cos, sin))  # they get no gradient
    return x, cos, sin, interleaved


def _fake(x, cos, sin, interleaved):
    return torch.empty_like(x if x.stride(3) == 1 else x.contiguous())


OP = Op(
    "rope",
    reference,
    check=check,
    forward=("(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> (Tensor y)", _fake),
    backward=("(Tensor dy, Tensor cos, Tensor sin, bool interleaved) -> (Tensor dx)", _fake),
    backends={"cuda": None, "triton": None, "cpu": None},
)


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    backend: Literal["cuda", "triton", "cpu", "reference"] | None = None,
) -> Tensor:
    """Rotary position embedding of queries or keys in one pass.

    Element i of the first half of the n rotated dims and element i of the second (interleaved: elements 2i
    and 2i + 1) are a pair (a, b): y_a = a * cos[i] - b * sin[i], y_b = b * cos[i + n/2] + a * sin[i + n/2],
    in float32. Differentiable in x.

    Args:
        x: float32, float16, bfloat16 or float64, shape [batch, heads, seq, dim]; any strides with a
            contiguous last axis are read in place, so that heads may stand behind the sequence in memory.
        cos, sin: [seq, n] or [batch, seq, n] of the positions' angles, in x's dtype or float32; n <= dim is
            even, dims from n on are copied. Both halves hold the same angles, as Hugging Face's tables do,
            interleaved or not. They get no gradient.
        interleaved: pairs are neighbours rather than halves.
        backend: None chooses; a named backend runs it or raises.

    Returns:
        y, like x; laid out in memory as x is.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: `backend` refuses, with its reason.

    Source: https://arxiv.org/abs/2104.09864.
    """
    if may_be_usual(backend) and (y := OP.usual(x, cos, sin, interleaved)) is not None:
        return y
    (y,) = OP(backend, check(x, cos, sin, interleaved))
    return y
