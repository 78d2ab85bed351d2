"""Cases by number, without end: sizes, options, layouts in memory and wanted gradients are drawn.

drawn("attention", 7) is the same case everywhere. The cases by name say what they are for; these are for
what nobody thought of: two options at once, a layout, an odd size beside a gradient that nobody wants.

Left to the cases by name is where a gradient is 0 but for rounding, as q's is with one key, or keys that are
all alike: there the reference is exact by luck, and 2 * 0 is no measure.
"""

import random
from collections.abc import Iterable

import torch
from torch import Tensor

from . import Case, Draw, cases_of
from .decode_attention import paged, with_int8
from .rope import tables
from .tiled_heads import WIDTHS

_SIZES = (1, 1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 41, 48, 63, 64, 65, 70, 96, 100, 127, 128, 129, 150)
_COLS = (1, 2, 3, 7, 8, 16, 31, 33, 64, 65, 100, 127, 128, 129, 200, 256, 257, 384, 500, 512, 513, 768)
_WIDE_COLS = (1000, 1024, 1025, 2048, 3000, 4096, 4097, 8200)
_HEADS = (1, 3, 8, 16, 20, 24, 32, 40, 48, 64, 65, 72, 80, 96, 100, 128, 160, 192, 256)
_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


class _Pick(random.Random):
    """Draws what a case is, not its numbers."""

    def often(self, p: float) -> bool:
        return self.random() < p

    def layout(
        self, d: Draw, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None, tokens: int = -1
    ) -> Tensor:
        """Normal numbers that lie whole, in gaps, with axes in another order, again and again, or last apart.

        tokens: the axis along which nothing is repeated.
        """
        kind = self.choice(("whole", "whole", "gaps", "order", "order and gaps", "again", "apart"))
        dims = len(shape)
        if kind == "again" and dims > 2:
            axis = self.choice([a for a in range(dims - 1) if a != tokens])
            one = (*shape[:axis], 1, *shape[axis + 1 :])
            return d.normal(*one, scale=scale, dtype=dtype).expand(shape)
        if kind == "apart" and dims > 1:
            return d.normal(*shape[:-2], shape[-1], shape[-2], scale=scale, dtype=dtype).transpose(-1, -2)
        order = list(range(dims - 1))
        if "order" in kind:
            self.shuffle(order)
        before, after = (self.choice((0, 1, 3, 8)), self.choice((0, 2, 5, 8))) if "gaps" in kind else (0, 0)
        lies = [*(shape[a] for a in order), before + shape[-1] + after]
        t = d.normal(*lies, scale=scale, dtype=dtype)[..., before : before + shape[-1]]
        return t.permute(*(order.index(a) for a in range(dims - 1)), dims - 1)

    def rows(self, few: bool = False) -> tuple[int, ...]:
        """The axes before the last."""
        shapes = (
            [(), (1,), (2,), (7,), (3, 5)] if few else [(), (1,), (3,), (33,), (5, 17), (2, 3, 19), (70,)]
        )
        return self.choice(shapes)

    def dropout(self) -> dict:
        if not self.often(0.35):
            return {}
        return {"dropout_p": self.choice((0.1, 0.25, 0.5, 0.9)), "seed": self.randrange(-(2**63), 2**63)}

    def parameter(self, d: Draw, cols: int, mean: float = 0.0) -> Tensor | None:
        """None, or [cols] in x's dtype or in float32, whole or from within a longer one."""
        if self.often(0.25):
            return None
        dtype = self.choice((d.dtype, torch.float32))
        start = self.choice((0, 0, 1, 4))
        return (d.normal(cols + start, dtype=dtype) + mean)[start:]


def drawn(op: str, number: int) -> tuple[Case, tuple[str, ...]]:
    """(the number-th drawn case of an op, the arguments whose gradients it wants)."""

    def inputs(d: Draw) -> dict:
        return _MAKERS[op](_Pick(f"{op} {number}"), d)

    pick, differentiable = _Pick(f"gradients {op} {number}"), cases_of(op)[1]
    wanted = differentiable if pick.often(0.6) else tuple(n for n in differentiable if pick.often(0.5))
    return Case(f"drawn-{number}", inputs), wanted


def cotangents(op: str, number: int, outputs: Iterable[Tensor]) -> list[Tensor]:
    """What the gradients of such a case begin with, one per output, in layouts that are drawn too."""
    pick, d = _Pick(f"cotangents {op} {number}"), Draw(number, torch.float32)
    drawn = [pick.layout(d, *o.shape) if o.dim() else d.normal() for o in outputs]
    return [t.to(o.device, o.dtype) for t, o in zip(drawn, outputs, strict=True)]


def _softmax(pick: _Pick, d: Draw) -> dict:
    rows, cols = pick.rows(), pick.choice(_COLS + _WIDE_COLS)
    if causal := pick.often(0.3):
        rows, cols = (*rows[:2], min(cols, 130)), min(cols, 130)
    options = {"causal": causal, "scale": pick.choice((1.0, 1.0, 0.125, -2.0))}
    if pick.often(0.4):
        options["mask"] = _mask(pick, d, (*rows, cols))
    return {"x": pick.layout(d, *rows, cols)} | options


def _mask(pick: _Pick, d: Draw, shape: tuple[int, ...]) -> Tensor:
    """Boolean, of a shape that broadcasts to `shape`, whole or seen through another order."""
    own = tuple(1 if pick.often(0.3) else n for n in shape)[pick.randrange(len(shape)) if shape else 0 :]
    p = pick.choice((0.1, 0.5, 0.9))
    if len(own) > 1 and pick.often(0.3):
        return d.booleans(*own[:-2], own[-1], own[-2], p=p).transpose(-1, -2)
    return d.booleans(*own, p=p)


def _layer_norm(pick: _Pick, d: Draw) -> dict:
    made = _rms_norm(pick, d)
    made.pop("weight_offset")
    return made | {"bias": pick.parameter(d, made["x"].shape[-1])}


def _rms_norm(pick: _Pick, d: Draw) -> dict:
    cols = pick.choice(_COLS[3:] + _WIDE_COLS)  # of 2 or 3 numbers the variance may be next to nothing
    shape = (*pick.rows(few=cols >= 1000), cols)
    made = {"x": pick.layout(d, *shape), "weight": pick.parameter(d, cols, mean=1.0)} | pick.dropout()
    if pick.often(0.5):
        made["residual"] = pick.layout(d, *shape)
    offset = pick.choice((0.0, 1.0)) if made["weight"] is not None else 0.0
    return made | {"weight_offset": offset, "eps": pick.choice((1e-6, 1e-5, 1e-3))}


def _dropout_add(pick: _Pick, d: Draw) -> dict:
    cols = pick.choice(_COLS + _WIDE_COLS)
    shape = (*pick.rows(few=cols >= 1000), cols)
    residual = pick.layout(d, *shape) if pick.often(0.6) else None
    return {"x": pick.layout(d, *shape), "residual": residual} | pick.dropout()


def _bias_act(pick: _Pick, d: Draw) -> dict:
    cols = pick.choice(_COLS + _WIDE_COLS)
    shape = (*pick.rows(few=cols >= 1000), cols)
    made = {"x": pick.layout(d, *shape), "bias": pick.parameter(d, cols)}
    return made | {"activation": pick.choice(_ACTIVATIONS)} | pick.dropout()


def _glu(pick: _Pick, d: Draw) -> dict:
    cols = pick.choice(_COLS + _WIDE_COLS)
    shape = (*pick.rows(few=cols >= 1000), cols)
    gate, up = pick.layout(d, *shape), pick.layout(d, *shape)
    if pick.often(0.3):
        gate, up = d.normal(*shape[:-1], 2 * cols).chunk(2, -1)
    return {"gate": gate, "up": up, "activation": pick.choice(("silu", "gelu", "relu"))}


def _rope(pick: _Pick, d: Draw) -> dict:
    batch, heads, seq = pick.choice((1, 2, 3)), pick.choice((1, 2, 5)), pick.choice(_SIZES)
    dim = pick.choice((2, 3, 8, 16, 20, 41, 64, 96, 128, 130, 256))
    turned = pick.choice((dim // 2 * 2, dim // 2 * 2, 2, max(2, dim // 4 * 2)))
    before = pick.choice(((), (1,), (batch,)))
    made = tables(d, *before, seq, turned, dtype=pick.choice((d.dtype, torch.float32)))
    return {"x": pick.layout(d, batch, heads, seq, dim), "interleaved": pick.often(0.4)} | made


def _loss(pick: _Pick, d: Draw, rows: tuple[int, ...], classes: int) -> dict:
    """A loss's target and options; some targets are ignored."""
    ignored = pick.choice((-100, -100, 0, classes - 1))
    target = d.integers(0, classes, *rows)
    target = target.masked_fill(d.booleans(*rows, p=pick.choice((0.0, 0.2, 0.8))), ignored)
    options = {"label_smoothing": pick.choice((0.0, 0.0, 0.1, 1.0)), "z_loss": pick.choice((0.0, 0.0, 1e-2))}
    reduction = pick.choice(("none", "sum", "mean"))
    return {"target": target, "ignore_index": ignored, "reduction": reduction} | options


def _cross_entropy(pick: _Pick, d: Draw) -> dict:
    classes = pick.choice(_COLS + _WIDE_COLS)
    rows = pick.rows(few=classes >= 1000)
    return {"logits": pick.layout(d, *rows, classes, scale=3.0)} | _loss(pick, d, rows, classes)


def _linear_cross_entropy(pick: _Pick, d: Draw) -> dict:
    rows, dim, classes = pick.rows(), pick.choice((1, 3, 16, 20, 33, 64, 70)), pick.choice(_COLS)
    made = {"x": pick.layout(d, *rows, dim), "weight": pick.layout(d, classes, dim, scale=0.5)}
    made |= {"bias": d.normal(classes) if pick.often(0.5) else None}
    return made | _loss(pick, d, rows, classes)


def _feed_forward(pick: _Pick, d: Draw) -> dict:
    dim, hidden, out = (pick.choice((1, 3, 8, 16, 20, 33, 64, 70, 130)) for _ in range(3))
    made = {"x": pick.layout(d, *pick.rows(), dim)}
    made |= {"w1": pick.layout(d, hidden, dim, scale=0.3), "w2": pick.layout(d, out, hidden, scale=0.3)}
    made |= {"b1": d.normal(hidden) if pick.often(0.7) else None}
    made |= {"b2": d.normal(out) if pick.often(0.7) else None}
    return made | {"activation": pick.choice(_ACTIVATIONS)} | pick.dropout()


def _heads(pick: _Pick) -> tuple[int, int, int, int]:
    """(heads, kv_heads, dim, dim_v); two of three are of the widths that csrc/cuda has tiles of."""
    kv_heads = pick.choice((1, 1, 2, 3))
    heads = kv_heads * pick.choice((1, 1, 2, 4))
    dim = pick.choice(WIDTHS[:4]) if pick.often(0.6) else pick.choice(_HEADS)
    return heads, kv_heads, dim, pick.choice(_HEADS) if pick.often(0.15) else dim


def _scores(pick: _Pick, d: Draw, batch: int, heads: int) -> dict:
    """Options of all three attentions."""
    made = {"window": (pick.choice((None, 3, 20, 70)), pick.choice((None, 2, 33)))}
    made = made if pick.often(0.35) else {}
    if pick.often(0.25):
        made["softcap"] = pick.choice((1.0, 5.0, 30.0))
    if pick.often(0.25):
        shape = (heads,) if pick.often(0.5) else (batch, heads)
        made["alibi_slopes"] = d.normal(*shape, scale=0.2, dtype=torch.float32)
    if pick.often(0.3):
        made["scale"] = pick.choice((0.05, 0.3, -0.2))
    return made | {"return_lse": pick.often(0.5)}


def _attention(pick: _Pick, d: Draw) -> dict:
    batch, (heads, kv_heads, dim, dim_v) = pick.choice((1, 1, 2)), _heads(pick)
    queries, keys = pick.choice(_SIZES), pick.choice(_SIZES[4:])
    queries = keys if pick.often(0.3) else queries
    made = {
        "q": pick.layout(d, batch, heads, queries, dim, tokens=2),
        "k": pick.layout(d, batch, kv_heads, keys, dim, tokens=2),
    }
    made |= {"v": pick.layout(d, batch, kv_heads, keys, dim_v, tokens=2)} | _scores(pick, d, batch, heads)
    causal = pick.choice((False, False, "top_left", "bottom_right", queries == keys))
    made |= {"causal": causal} | pick.dropout()
    full = (batch, heads, queries, keys)
    if pick.often(0.25):
        made["mask"] = _mask(pick, d, full)
    if pick.often(0.3):
        shape = [*(1 if pick.often(0.3) else n for n in full[:3]), keys]
        made["bias"] = pick.layout(d, *shape, dtype=pick.choice((d.dtype, torch.float32)))
        if pick.often(0.4):
            hidden = d.booleans(*shape, p=0.2)
            made["bias"] = made["bias"].masked_fill(hidden, float("-inf"))
    if pick.often(0.3):
        lengths = [pick.choice((0, keys // 2, keys)) for _ in range(batch)]
        made["kv_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    return made


def _lengths(pick: _Pick, sequences: int) -> list[int]:
    return [pick.choice((0, *_SIZES[4:])) for _ in range(sequences)]


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=torch.int32)


def _attention_varlen(pick: _Pick, d: Draw) -> dict:
    sequences, (heads, kv_heads, dim, dim_v) = pick.choice((1, 2, 3)), _heads(pick)
    q_lengths, k_lengths = _lengths(pick, sequences), _lengths(pick, sequences)
    alike = pick.often(0.4)
    k_lengths = q_lengths if alike else k_lengths
    made = {
        "q": pick.layout(d, sum(q_lengths), heads, dim, tokens=0),
        "k": pick.layout(d, sum(k_lengths), kv_heads, dim, tokens=0),
    }
    made |= {"v": pick.layout(d, sum(k_lengths), kv_heads, dim_v, tokens=0)} | _scores(
        pick, d, sequences, heads
    )
    starts = _starts(q_lengths)
    made |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts if alike else _starts(k_lengths)}
    spare = pick.choice((0, 0, 7, 100))  # maxima may be more than the longest
    made |= {"max_q": max(q_lengths) + spare, "max_k": max(k_lengths) + spare}
    return made | {"causal": pick.choice((False, False, "top_left", "bottom_right", alike))} | pick.dropout()


def _cache(pick: _Pick, d: Draw, inputs: dict, dim: int, dim_v: int, kv_heads: int, slots: int) -> dict:
    """Caches, perhaps of int8, perhaps in pages."""
    batch = inputs["kv_lengths"].shape[0]
    inputs = inputs | {"k_cache": d.normal(batch, kv_heads, slots, dim)}
    inputs |= {"v_cache": d.normal(batch, kv_heads, slots, dim_v)}
    if pick.often(0.3):
        inputs = with_int8(d, inputs)
    if pick.often(0.4):
        return paged(d, inputs, pick.choice((1, 3, 16, 32, 50)))
    if "k_scale" not in inputs and pick.often(0.5):
        k = d.normal(batch, slots, kv_heads, dim).transpose(1, 2)
        inputs |= {"k_cache": k, "v_cache": d.slice_of((batch, kv_heads, slots, dim_v + 9), 8, dim_v)}
    return inputs


def _decode_attention(pick: _Pick, d: Draw) -> dict:
    batch, (heads, kv_heads, dim, dim_v) = pick.choice((1, 2, 4)), _heads(pick)
    queries, slots = pick.choice((1, 1, 1, 2, 5)), pick.choice((*_SIZES, 300, 700))
    lengths = [pick.choice((0, 1, slots // 2, slots)) for _ in range(batch)]
    made = {"kv_lengths": torch.tensor(lengths, dtype=torch.int32)}
    made |= {"q": pick.layout(d, batch, heads, queries, dim)} | _scores(pick, d, batch, heads)
    return _cache(pick, d, made, dim, dim_v, kv_heads, slots)


def _append_kv(pick: _Pick, d: Draw) -> dict:
    batch, (_, kv_heads, dim, dim_v) = pick.choice((1, 2, 4)), _heads(pick)
    slots = pick.choice(_SIZES)
    tokens = min(pick.choice((0, 1, 1, 2, 5, 40)), slots)
    lengths = [pick.choice((0, (slots - tokens) // 2, slots - tokens)) for _ in range(batch)]
    made = {
        "k": pick.layout(d, batch, kv_heads, tokens, dim),
        "v": pick.layout(d, batch, kv_heads, tokens, dim_v),
    }
    made |= {"kv_lengths": torch.tensor(lengths, dtype=torch.int32)}
    return _cache(pick, d, made, dim, dim_v, kv_heads, slots)


_MAKERS = {
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "dropout_add": _dropout_add,
    "bias_act": _bias_act,
    "glu": _glu,
    "rope": _rope,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "feed_forward": _feed_forward,
    "attention": _attention,
    "attention_varlen": _attention_varlen,
    "decode_attention": _decode_attention,
    "append_kv": _append_kv,
}
