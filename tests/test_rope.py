"""rope beyond its cases: what it means, memory layout, tables without gradients, bad input, drawn calls."""

import pytest
import torch
from bad_input import assert_told
from hypothesis import given, settings
from hypothesis import strategies as st
from native_backends import BACKENDS

from fastlm._op import OPS
from fastlm.ops import rope
from fastlm.testing.cases import DTYPES, Draw
from fastlm.testing.cases.rope import tables
from fastlm.testing.compare import verdicts


def _inputs(batch, heads, seq, dim, rotated=None, dtype=torch.float32):
    draw = Draw(0, dtype)
    return draw.normal(batch, heads, seq, dim), *tables(draw, seq, rotated or dim).values()


def _rotate_half(x):
    """As Hugging Face's models write it."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _neighbours(x):
    """Elements i and i + n / 2 as elements 2i and 2i + 1."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_the_formula_of_hugging_faces_models(backend, interleaved):
    """Also of tables whose halves differ, and in its gradient."""
    draw = Draw(0, torch.float32)
    x, dy = (draw.normal(2, 3, 7, 16).requires_grad_() for _ in range(2))
    cos, sin = draw.normal(7, 16), draw.normal(7, 16)
    lay = _neighbours if interleaved else torch.clone
    expected = lay(x * cos + _rotate_half(x) * sin)
    got = rope(lay(x), cos, sin, interleaved=interleaved, backend=backend)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy) for y in (got, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_are_complex_numbers_turned_by_their_angle(backend, interleaved):
    x, cos, sin = _inputs(2, 3, 7, 16)
    pairs = x.unflatten(-1, (8, 2) if interleaved else (2, 8))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[:, :8]
    expected = torch.view_as_real(turned)
    expected = expected.flatten(-2) if interleaved else expected.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rope(x, cos, sin, interleaved=interleaved, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_dims_past_the_tables_are_copied_bitwise(backend, interleaved):
    x, cos, sin = _inputs(2, 3, 7, 41, 10)
    x[..., 40] = float("nan")
    y = rope(x, cos, sin, interleaved=interleaved, backend=backend)
    assert torch.equal(y[..., 10:].nan_to_num(7), x[..., 10:].nan_to_num(7))
    assert torch.equal(y[..., :10], rope(x[..., :10], cos, sin, interleaved=interleaved, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sequence_has_its_own_positions(backend):
    x, cos, sin = _inputs(2, 3, 7, 16)
    shifted = torch.stack((cos, cos.flip(0))), torch.stack((sin, sin.flip(0)))
    y = rope(x, *shifted, backend=backend)
    assert torch.equal(y[0], rope(x, cos, sin, backend=backend)[0])
    assert torch.equal(y[1], rope(x, cos.flip(0), sin.flip(0), backend=backend)[1])


def test_scores_depend_on_the_distance_alone():
    angles = torch.outer(torch.arange(12.0), 0.5 ** torch.arange(8.0)).repeat(1, 2).double()
    q, k = (torch.randn(1, 1, 1, 16).double().expand(1, 1, 12, 16) for _ in range(2))
    scores = rope(q, angles.cos(), angles.sin()) @ rope(k, angles.cos(), angles.sin()).transpose(2, 3)
    for distance in range(-11, 12):
        diagonal = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_the_output_and_the_gradient_lie_in_memory_as_their_inputs():
    packed = torch.randn(2, 9, 3, 4, 16)  # [batch, seq, which, heads, dim]
    x = packed[:, :, 1].transpose(1, 2).requires_grad_()
    y = rope(x, *_inputs(1, 1, 9, 16)[1:], backend="cpu")
    assert y.transpose(1, 2).is_contiguous()
    (dx,) = torch.autograd.grad(y, x, torch.randn(2, 9, 4, 16).transpose(1, 2))
    assert dx.transpose(1, 2).is_contiguous()


def test_strided_heads_are_read_in_place():
    x = torch.randn(2, 9, 3, 4, 16)[:, :, 1].transpose(1, 2)
    cos, sin = _inputs(1, 1, 9, 16)[1:]
    with torch.profiler.profile() as profile:
        y = rope(x, cos, sin, backend="cpu")
    assert not [
        e.name for e in profile.events() if e.name in ("aten::contiguous", "aten::clone", "aten::copy_")
    ]
    assert torch.equal(y, rope(x.contiguous(), cos, sin, backend="cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_get_no_gradient(backend):
    x, cos, sin = (t.requires_grad_() for t in _inputs(1, 2, 5, 8))
    y = rope(x, cos, sin, backend=backend)
    dx, *none = torch.autograd.grad(y.sum(), (x, cos, sin), allow_unused=True)
    assert dx is not None and none == [None, None]
    assert not rope(x.detach(), cos, sin, backend=backend).requires_grad


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_backward_kernel_passes_opcheck(interleaved):
    x, cos, sin = _inputs(2, 3, 7, 22, 10)
    for dy in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(OPS["rope"].backward["cpu"], (dy, cos, sin, interleaved))


X, TABLE = torch.zeros(2, 3, 5, 8), torch.zeros(5, 8)
SHAPE = "must have shape [5, n] or [2, 5, n] on cpu, n even and at most 8, got torch.float32 of shape"
BAD = [
    ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
    ({"x": X.long()}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int64"),
    (
        {"x": X[0]},
        ValueError,
        "x must have shape [batch, heads, seq, dim], got torch.float32 of shape (3, 5, 8)",
    ),
    ({"cos": None}, TypeError, "cos must be a tensor, got NoneType"),
    ({"cos": TABLE[:4]}, ValueError, f"cos {SHAPE} (4, 8)"),
    ({"cos": TABLE[0]}, ValueError, f"cos {SHAPE} (8,)"),
    ({"cos": torch.zeros(5, 10)}, ValueError, f"cos {SHAPE} (5, 10)"),
    ({"cos": TABLE[:, :7]}, ValueError, f"cos {SHAPE} (5, 7)"),
    ({"cos": TABLE[:, :0]}, ValueError, f"cos {SHAPE} (5, 0)"),
    ({"cos": TABLE.expand(3, 5, 8)}, ValueError, f"cos {SHAPE} (3, 5, 8)"),
    ({"cos": TABLE.expand(1, 1, 5, 8)}, ValueError, f"cos {SHAPE} (1, 1, 5, 8)"),
    ({"cos": TABLE.to("meta")}, ValueError, "cos must have shape [5, n] or [2, 5, n] on cpu"),
    ({"cos": TABLE.half()}, TypeError, "cos must be torch.float32 as x or float32, got torch.float16"),
    ({"sin": TABLE[:, :6]}, ValueError, "sin must be like cos, torch.float32 of shape (5, 8) on cpu, got"),
    ({"interleaved": 1}, TypeError, "interleaved must be a bool, got int"),
    (
        {"backend": "gpu"},
        ValueError,
        "backend must be one of cuda, triton, cpu, reference or None, got 'gpu'",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input_is_told_before_any_kernel_runs(change, error, words):
    assert_told(rope, {"x": X, "cos": TABLE, "sin": TABLE} | change, error, words)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70)),
    half=st.integers(1, 20),
    rest=st.integers(0, 9),
    layout=st.sampled_from(("heads first", "sequence first", "packed")),
    per_sequence=st.booleans(),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_drawn_calls_are_as_right_as_the_reference(
    sizes, half, rest, layout, per_sequence, interleaved, dtype, seed
):
    (batch, heads, seq), dim, d = sizes, 2 * half + rest, Draw(seed, dtype)
    x = d.normal(batch, heads, seq, dim)
    if layout != "heads first":
        x = d.normal(batch, seq, heads, dim).transpose(1, 2)
    if layout == "packed":
        x = d.normal(batch, seq, heads, 3, dim)[..., 1, :].transpose(1, 2)
    inputs = {"x": x} | tables(d, *([batch] if per_sequence else []), seq, 2 * half)
    found = verdicts(rope, [inputs | {"interleaved": interleaved}], ("x",), "cpu")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))
