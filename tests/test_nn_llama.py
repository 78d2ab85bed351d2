"""RMSNorm, RotaryEmbedding and GatedFeedForward beside their twins: outputs, gradients, keys, bad input."""

import copy

import pytest
import torch
from llama_parts import GatedMLP, GemmaNorm, LlamaNorm
from torch import nn
from twins import assert_alike, pair

import fastlm
from fastlm.testing.compare import KernelCalls

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(41,), (3, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
def test_rms_norm_computes_what_its_twin_does(shape, options, dtype):
    ours, twin = pair(fastlm.nn.RMSNorm, nn.RMSNorm, shape, **options)
    if ours.weight is not None:
        nn.init.normal_(ours.weight)
    twin.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.RMSNorm) and list(ours.state_dict()) == list(twin.state_dict())
    x = torch.randn(6, *shape).to(dtype)
    assert assert_alike(ours.to(dtype), twin.to(dtype), [x]) == {"rms_norm", "rms_norm_backward"}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_default_eps_is_the_one_that_torch_uses(dtype):
    x = torch.full((1, 8), 2e-4, dtype=dtype)  # mean square 4e-8, beside an eps of 1.2e-7 in float32
    ours, twin = fastlm.nn.RMSNorm(8, dtype=dtype), nn.RMSNorm(8, dtype=dtype)
    torch.testing.assert_close(ours(x), twin(x))
    assert ours.eps is None


def test_rms_norm_refuses_another_shape_in_torchs_words():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        fastlm.nn.RMSNorm(8)(torch.randn(3, 9))


def test_rms_norm_returns_the_twins_dtype_under_autocast():
    ours, twin = pair(fastlm.nn.RMSNorm, nn.RMSNorm, 8, 1e-6)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="Mismatch dtype"):
        for x in (torch.randn(3, 8), torch.randn(3, 8).bfloat16()):
            assert ours(x).dtype == twin(x).dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ours", "twin"), [(fastlm.nn.LlamaRMSNorm, LlamaNorm), (fastlm.nn.GemmaRMSNorm, GemmaNorm)]
)
def test_the_norms_of_llama_and_gemma_compute_what_their_models_do(ours, twin, dtype):
    made, other = pair(ours, twin, 24, eps=1e-3)
    torch.testing.assert_close(ours(24)(torch.ones(2, 24)), torch.ones(2, 24))
    x = torch.randn(3, 5, 24).to(dtype)
    assert assert_alike(made.to(dtype), other.to(dtype), [x]) == {"rms_norm", "rms_norm_backward"}


@pytest.mark.parametrize(
    ("activation", "act_fn"),
    [("silu", nn.SiLU()), ("gelu", nn.GELU()), ("gelu_tanh", nn.GELU("tanh")), ("relu", nn.ReLU())],
)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_feed_forward_computes_what_its_steps_do(activation, act_fn, bias):
    ours = fastlm.nn.GatedFeedForward(24, 40, activation, bias=bias)
    twin = GatedMLP(24, 40, act_fn, bias=bias)
    kinds = ("weight", "bias") if bias else ("weight",)
    assert list(ours.state_dict()) == [f"{n}_proj.{k}" for n in ("gate", "up", "down") for k in kinds]
    twin.load_state_dict(ours.state_dict())
    assert assert_alike(ours, twin, [torch.randn(3, 5, 24)]) == {"glu", "glu_backward"}


def test_gated_feed_forward_is_made_where_and_as_it_is_asked():
    made = fastlm.nn.GatedFeedForward(8, 16, bias=True, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.float16)}


def test_gated_feed_forward_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="GatedFeedForward: activation must be one of 'gelu', .* got 'tanh'"):
        fastlm.nn.GatedFeedForward(8, 8, "tanh")


def test_gated_feed_forward_returns_its_steps_dtype_under_autocast():
    ours, twin = fastlm.nn.GatedFeedForward(8, 16, bias=True), GatedMLP(8, 16, nn.SiLU(), bias=True)
    with torch.autocast("cpu", torch.bfloat16), KernelCalls() as calls:
        assert ours(torch.randn(3, 8)).dtype == twin(torch.randn(3, 8)).dtype
    assert calls.names == ["glu.cpu"]


def _expected(x, positions, dim, base=10000.0):
    """Each pair (i, i + dim / 2) as a complex number times e^(i * position * base^(-2i / dim))."""
    half = dim // 2
    angles = positions.double()[..., None] * base ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(-3)
    z = torch.complex(x[..., :half].double(), x[..., half:dim].double()) * turn
    return torch.cat((z.real, z.imag, x[..., dim:].double()), -1).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "base"), [(16, 10000.0), (10, 500000.0)])
def test_rotary_embedding_turns_by_the_angles_of_the_positions(dim, base, dtype):
    rotary = fastlm.nn.RotaryEmbedding(dim, 40, base).to(dtype)
    q, k = torch.randn(2, 4, 7, 16).to(dtype), torch.randn(2, 2, 7, 16).to(dtype)
    ids = torch.randint(40, (2, 7))
    for options, positions in (
        ({}, torch.arange(7)),
        ({"offset": 30}, torch.arange(30, 37)),
        ({"position_ids": ids}, ids),
        ({"position_ids": ids[0]}, ids[0]),
    ):
        with KernelCalls() as calls:
            found = rotary(q, k, **options)
        assert calls.names == ["rope.cpu", "rope.cpu"]
        for got, x in zip(found, (q, k), strict=True):
            torch.testing.assert_close(got, _expected(x, positions, dim, base))


def test_rotary_embedding_interleaved_turns_neighbours():
    x = torch.randn(1, 2, 5, 8)
    got, _ = fastlm.nn.RotaryEmbedding(8, 5, interleaved=True)(x, x)
    halves = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    expected = _expected(halves, torch.arange(5), 8).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(got, expected)


def test_rotary_tables_stay_exact_and_out_of_the_state_dict():
    rotary = fastlm.nn.RotaryEmbedding(8, 1000)
    angles = torch.outer(torch.arange(1000.0).double(), 10000 ** (-torch.arange(4).double() / 4)).repeat(1, 2)
    expected = angles.cos().float(), angles.sin().float()  # angles in float32 would be 3e-5 away
    torch.testing.assert_close((rotary.cos, rotary.sin), expected, rtol=0, atol=1e-7)
    exact = rotary.cos.clone(), rotary.sin.clone()
    assert not rotary.state_dict() and rotary.cos.dtype == torch.float32
    for other in (copy.deepcopy(rotary).bfloat16(), copy.deepcopy(rotary).to("meta").to_empty(device="cpu")):
        assert torch.equal(other.cos, exact[0]) and torch.equal(other.sin, exact[1])
    assert copy.deepcopy(rotary).double().cos.dtype == torch.float64
    assert fastlm.nn.RotaryEmbedding(8, device="meta").cos.device.type == "meta"


def test_rotary_embedding_compiles_whole():
    rotary, q = fastlm.nn.RotaryEmbedding(8, 16), torch.randn(1, 2, 5, 8)
    compiled = torch.compile(
        lambda q, offset: rotary(q, q, offset=offset), fullgraph=True, backend="aot_eager"
    )
    for offset in (0, 3, 4):
        assert all(map(torch.equal, compiled(q, offset), rotary(q, q, offset=offset)))


def test_rotary_embedding_refuses_what_its_tables_do_not_hold():
    rotary, q = fastlm.nn.RotaryEmbedding(8, 6), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"positions must lie in \[0, max_positions=6\), got 2 to 6"):
        rotary(q, q, offset=2)
    with pytest.raises(ValueError, match="positions must lie in .* got -1 to 3"):
        rotary(q, q, offset=-1)
    with pytest.raises(ValueError, match="offset must be 0 beside position_ids, got 1"):
        rotary(q, q, offset=1, position_ids=torch.arange(5))
    with pytest.raises(IndexError):
        rotary(q, q, position_ids=torch.arange(5) + 2)
    for dim in (7, 0, -2):
        with pytest.raises(ValueError, match=f"RotaryEmbedding: dim must be even and positive, got {dim}"):
            fastlm.nn.RotaryEmbedding(dim)
