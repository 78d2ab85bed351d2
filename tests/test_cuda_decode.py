"""Decoding's CUDA kernels beyond their cases: nothing outside a cache, far offsets, launches by shapes."""

import pytest
import torch
from decoding import check_tokens_without_a_slot_are_dropped, decode_inputs, lengths_of, raw_arguments

from fastlm import ops
from fastlm.testing import ptxsim
from fastlm.testing.compare import verdicts
from fastlm.testing.ptxsim import cuda

NAN = float("nan")


@pytest.fixture(autouse=True)
def simulated():
    with ptxsim.device("sm_80"):
        yield


def _decoded(arguments):
    return torch.ops.fastlm.decode_attention.cuda(*arguments)


def _same(first, second):
    return all(torch.equal(f, s) for f, s in zip(first, second, strict=True))


def test_launches_do_not_depend_on_what_the_lengths_are():
    arguments, launches = raw_arguments("pieces", torch.float16), []
    for lengths in (1100, 513), (0, 1):
        arguments[3] = lengths_of(*lengths)
        _decoded(arguments)
        launches.append(cuda.runtime().launches)
    assert len(launches[0]) == 2 and launches[0] == launches[1]


@pytest.mark.parametrize("lengths", [(1101, -3), (1 << 30, -(1 << 31)), ((1 << 31) - 1, 0)])
def test_lengths_outside_the_cache_are_those_of_its_ends(lengths):
    arguments = raw_arguments("pieces", torch.float16)
    arguments[3] = lengths_of(1100, 0)
    wanted = _decoded(arguments)
    arguments[3] = lengths_of(*lengths)
    assert _same(_decoded(arguments), wanted)


def test_page_numbers_outside_the_cache_are_not_followed():
    arguments = raw_arguments("paged-shared", torch.float16)
    table = arguments[4] = torch.tensor([[3, 5, 1 << 30], [-1, 4, -(1 << 31)]], dtype=torch.int32)
    got = _decoded(arguments)
    arguments[4] = torch.where((table >= 0) & (table < 5), table, 0)
    assert _same(got, _decoded(arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_whatever_the_capacity(dtype):
    inputs = decode_inputs(lengths=(690, 130), slots=700, dim=16, dtype=dtype)
    first = ops.decode_attention(**inputs, return_lse=True, backend="cuda")
    for more in (60, 2500):
        longer = dict(inputs)
        for name in ("k_cache", "v_cache"):
            longer[name] = torch.cat([inputs[name], inputs[name].new_full((2, 2, more, 16), NAN)], 2)
        assert _same(first, ops.decode_attention(**longer, return_lse=True, backend="cuda"))


@pytest.mark.parametrize(
    ("heads", "queries", "row_blocks"), [(2, 1, 1), (16, 1, 1), (8, 6, 1), (13, 5, 2)], ids=str
)
def test_rows_that_share_a_kv_head_share_the_reading_of_it(heads, queries, row_blocks):
    inputs = decode_inputs(lengths=(9,), queries=queries, heads=heads, kv_heads=1, slots=12)
    ops.decode_attention(**inputs, backend="cuda")
    (launch,) = cuda.runtime().launches
    assert launch.grid == (row_blocks, 1, 1)


@pytest.mark.parametrize(
    ("dtype", "dim", "rows"), [(torch.float32, 128, 33), (torch.float16, 256, 17)], ids=["float32", "float16"]
)
def test_more_than_48_kb_of_shared_memory_are_asked_for(dtype, dim, rows):
    """The stand-in runtime refuses such a launch where the kernel has not opted in."""
    inputs = decode_inputs(lengths=(20,), heads=rows, kv_heads=1, slots=24, dim=dim, dtype=dtype)
    out = ops.decode_attention(**inputs, backend="cuda")
    (launch,) = cuda.runtime().launches
    assert launch.shared > 48 << 10
    assert out.isfinite().all()
    assert all(v.ratio <= 1 for v in verdicts(ops.decode_attention, [inputs], (), "cuda"))


@pytest.mark.parametrize(
    ("dtype", "dim", "rows"),
    [
        *((torch.float16, 32, rows) for rows in (3, 20, 40)),
        *((torch.bfloat16, 128, rows) for rows in (3, 40)),
        *((torch.float32, 128, rows) for rows in (3, 20)),
    ],
    ids=str,
)
def test_more_keys_than_a_ring_holds(dtype, dim, rows):
    """Rings go round, as 133 sequences are so many blocks that keys are not cut into parts."""
    lengths = (290, 1) + (0,) * 131
    inputs = decode_inputs(lengths, heads=rows, kv_heads=1, slots=300, dim=dim, dtype=dtype)
    out = ops.decode_attention(**inputs, backend="cuda")
    assert len(cuda.runtime().launches) == 1
    assert out.isfinite().all()
    assert all(v.ratio <= 1 for v in verdicts(ops.decode_attention, [inputs], (), "cuda"))


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
def test_large_and_small_values_of_one_row_keep_their_digits(quantised):
    """A value of 1e4 with weight e^-30 beside one of 1e-5 with weight 1."""
    q, k = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 40, 16)
    k[0, 0, :20] = -30.0 / 4
    v = torch.full((1, 1, 40, 16), 1e-5)
    v[0, 0, :20] = 1e4
    wanted = ops.decode_attention(q.double(), k.double(), v.double(), lengths_of(40), backend="reference")
    inputs = {"q": q.half(), "k_cache": k.half(), "v_cache": v.half(), "kv_lengths": lengths_of(40)}
    if quantised:
        scales = [t.abs().amax(-1) / 127 for t in (k, v)]
        for name, t, scale in zip(("k", "v"), (k, v), scales, strict=True):
            inputs[f"{name}_cache"] = (t / scale.clamp_min(1e-30)[..., None]).round().to(torch.int8)
            inputs[f"{name}_scale"] = scale
    out = ops.decode_attention(**inputs, backend="cuda")
    assert torch.allclose(out.double(), wanted, rtol=0.01, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_caches_that_are_not_aligned_are_read_by_the_element(dtype):
    inputs, kernels, found = decode_inputs(dim=16, dtype=dtype), [], []
    for offset in (0, 1):
        for name in ("k_cache", "v_cache"):
            t = inputs[name]
            moved = torch.empty(t.numel() + offset, dtype=dtype)[offset:].view(t.shape)
            inputs[name] = moved.copy_(t)
        found.append(ops.decode_attention(**inputs, backend="cuda"))
        kernels.append(cuda.runtime().launches[0].kernel)
    assert "Lb1E" in kernels[0] and "Lb0E" in kernels[1]
    assert (found[0].double() - found[1].double()).abs().max() <= torch.finfo(dtype).eps


def _far(shape, stride, dtype):
    """Pages `stride` elements apart: memory that nobody touches costs nothing."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty((shape[0] - 1) * stride + shape[1:].numel(), dtype=dtype)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    return memory.as_strided(shape, (stride, shape[2] * shape[3], shape[3], 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_pages_past_two_to_the_31_elements_are_written_and_read(dtype):
    shape = torch.Size((3, 2, 4, 16))
    k, v, q = (torch.randn(1, 2, 3, 16, dtype=torch.float16) for _ in range(3))
    table, lengths = torch.tensor([[2, 1]], dtype=torch.int32), lengths_of(0)
    found = []
    for stride in (shape[1:].numel(), 3 << 29):
        caches = [_far(shape, stride, dtype) for _ in range(2)]
        scales = {n: torch.zeros(shape[:3]) for n in ("k_scale", "v_scale")} if dtype == torch.int8 else {}
        ops.append_kv(k, v, *caches, lengths, block_table=table, **scales, backend="cuda")
        after = lengths + 3
        found.append(ops.decode_attention(q, *caches, after, block_table=table, **scales, backend="cuda"))
        assert caches[0][2, :, :3].any()
        del caches
    assert torch.equal(*found) and found[0].isfinite().all()


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_tokens_without_a_slot_are_dropped(paged, quantised):
    check_tokens_without_a_slot_are_dropped("cuda", paged, quantised, far=(1 << 31) - 1)


def test_a_key_that_is_also_the_value_is_quantised_twice():
    x = torch.randn(1, 2, 3, 8)
    caches, scales = torch.zeros(2, 1, 2, 4, 8, dtype=torch.int8), torch.zeros(2, 1, 2, 4)
    torch.ops.fastlm.append_kv.cuda(x, x, *caches, lengths_of(0), None, *scales)
    assert torch.equal(caches[0], caches[1]) and torch.equal(scales[0], scales[1]) and scales[0].any()


def test_what_is_refused_is_refused_in_one_sentence():
    scattered, new = torch.zeros(1, 1, 8, 4).transpose(2, 3), torch.zeros(1, 1, 1, 8)
    with pytest.raises(NotImplementedError) as error:
        ops.append_kv(new, new, scattered, scattered, lengths_of(1), backend="cuda")
    sentence = "append_kv.cuda takes caches whose last dimension is contiguous, k_cache has stride 4"
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("dtype", "dim", "sentence"),
    [
        (
            torch.float32,
            129,
            "up to 128 in float32, got 129: backend='triton' takes them up to 256",
        ),
        (torch.float16, 257, "up to 256, got 257"),
        (torch.float32, 257, "up to 256, got 257"),
    ],
)
def test_head_dims_that_do_not_fit_are_refused_in_one_sentence(dtype, dim, sentence):
    inputs = decode_inputs(dim=dim, dtype=dtype)
    with pytest.raises(NotImplementedError) as error:
        ops.decode_attention(**inputs, backend="cuda")
    assert str(error.value) == f"decode_attention.cuda takes head dims {sentence}"
