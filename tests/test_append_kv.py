"""append_kv: every token in its slot, nothing else touched, int8 to the bit, refused without room."""

import numpy as np
import pytest
import torch
from bad_input import assert_told
from decoding import running

import fastlm
from fastlm._op import OPS
from fastlm.ops import append_kv
from fastlm.testing.cases import DTYPES, Draw, cases_of
from fastlm.testing.cases.decode_attention import paged
from fastlm.testing.compare import KernelCalls, outputs_of

BACKENDS = (*OPS["append_kv"].backends, "reference")
CASES = {case.name: case for case in cases_of("append_kv")[0]}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running(request.param):
        yield request.param


def _lengths(*lengths):
    return torch.tensor(lengths, dtype=torch.int32)


def _inputs(lengths=(3, 0), tokens=2, slots=9):
    d = Draw(0, torch.float32)
    k, v = d.normal(len(lengths), 2, tokens, 4), d.normal(len(lengths), 2, tokens, 6)
    caches = {"k_cache": d.normal(len(lengths), 2, slots, 4), "v_cache": d.normal(len(lengths), 2, slots, 6)}
    return {"k": k, "v": v, **caches, "kv_lengths": _lengths(*lengths)}


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("name", ["odd", "many-rows", "strided", "packed"])
def test_tokens_lie_behind_the_cached_ones_and_nothing_else_changes(backend, name, dtype):
    if backend != "reference" and dtype == torch.float64:
        return  # refused, as test_dispatch holds
    inputs = CASES[name].inputs(Draw(0, dtype))
    want = [inputs["k_cache"].clone(), inputs["v_cache"].clone()]
    for b, length in enumerate(inputs["kv_lengths"].tolist()):
        end = length + inputs["k"].shape[2]
        want[0][b, :, length:end], want[1][b, :, length:end] = inputs["k"][b], inputs["v"][b]
    lengths = inputs["kv_lengths"].clone()
    with KernelCalls() as calls:
        assert append_kv(**inputs, backend=backend) is None
    assert calls.names == ([] if backend == "reference" else [f"append_kv.{backend}"])
    assert torch.equal(inputs["k_cache"], want[0]) and torch.equal(inputs["v_cache"], want[1])
    assert torch.equal(inputs["kv_lengths"], lengths)


@pytest.mark.parametrize("page", [1, 5, 16, 64])
@pytest.mark.parametrize("name", ["odd", "int8-odd"])
def test_pages_hold_what_one_whole_cache_holds(backend, name, page):
    whole = CASES[name].inputs(Draw(0, torch.float32))
    written = outputs_of(append_kv, whole, backend=backend)
    names = [n for n in ("k_cache", "v_cache", "k_scale", "v_scale") if n in whole]
    want = paged(None, whole | dict(zip(names, written, strict=True)), page)
    got = outputs_of(append_kv, paged(None, whole, page), backend=backend)
    for name, g in zip(names, got, strict=True):
        assert torch.equal(g.nan_to_num(7), want[name].nan_to_num(7))


def _quantised_one_by_one(x: np.ndarray) -> tuple[list[int], np.float32]:
    scale = np.float32(np.abs(x).max() / np.float32(127))
    return [0 if scale == 0 else int(np.rint(value / scale)) for value in x], scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_the_nearest_multiple_of_the_scale_and_ties_go_to_even(backend, dtype):
    inputs = CASES["int8-unusual"].inputs(Draw(0, dtype))
    append_kv(**inputs, backend=backend)
    ties = [0, 2, 0, -2, 127, -127, 64, 126]
    assert inputs["v_cache"][0, 1, 5].tolist() == ties and inputs["v_scale"][0, 1, 5] == 1.0
    assert not inputs["k_cache"][0, 0, 5].any() and inputs["k_scale"][0, 0, 5] == 0
    assert inputs["k_scale"][0, 0, 6].isnan() and inputs["k_scale"][0, 0, 7] == torch.inf
    for token in range(4):
        x = inputs["v"][0, 0, token].float().numpy()
        q, scale = _quantised_one_by_one(x)
        assert inputs["v_cache"][0, 0, 5 + token].tolist() == q
        assert inputs["v_scale"][0, 0, 5 + token].item() == scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_the_same_to_the_bit_on_every_backend(dtype):
    inputs = CASES["many-rows"].inputs(Draw(0, dtype))
    for name in ("k", "v"):
        cache = inputs[f"{name}_cache"]
        inputs[f"{name}_cache"] = torch.zeros(cache.shape, dtype=torch.int8)
        inputs[f"{name}_scale"] = torch.zeros(cache.shape[:3])
    found = []
    for backend in BACKENDS:
        with running(backend):
            found.append(outputs_of(append_kv, inputs, backend=backend))
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))
    dequantised = found[0][0][:, :, 4:].float() * found[0][2][:, :, 4:, None]
    error = (dequantised[0] - inputs["k"][0].float()).abs()
    assert (error <= found[0][2][0, :, 4:, None] * 0.50001).all() and error.any()


@pytest.mark.parametrize("lengths", [(8, 0), (0, 9), (-1, 0)])
def test_a_token_without_a_slot_is_refused(backend, lengths):
    inputs = _inputs(lengths)
    before = inputs["k_cache"].clone()
    words = r"kv_lengths, before appending, must not be negative and leave room for 2 more in 9 slots, got \["
    with pytest.raises(ValueError, match=f"append_kv: {words}"):
        append_kv(**inputs, backend=backend)
    assert torch.equal(inputs["k_cache"], before)


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_page_that_does_not_exist_is_refused_where_a_token_would_go_there(backend, bad):
    inputs = _inputs((3, 0), tokens=5, slots=9)
    pages = {n: torch.zeros(5, 2, 4, inputs[n].shape[3]) for n in ("k_cache", "v_cache")}
    table = torch.tensor([[1, 2, bad], [0, 4, bad]], dtype=torch.int32)
    # Tokens 3 to 7 and 0 to 4: the second page is just full, the third is not needed.
    append_kv(**inputs | pages, block_table=table, backend=backend)
    table[0, 1] = bad
    words = rf"block_table must name pages in \[0, 5\), got \[1, {bad}\] for sequence 0"
    with pytest.raises(ValueError, match=f"append_kv: {words}"):
        append_kv(**inputs | pages, block_table=table, backend=backend)


@pytest.mark.parametrize("paging", [False, True])
def test_where_values_are_not_looked_at_a_token_without_a_slot_is_dropped(backend, paging):
    inputs = _inputs((8, -1, 1000, 2), slots=9)
    want = inputs["k_cache"].clone()
    want[0, :, 8], want[1, :, 0], want[3, :, 2:4] = inputs["k"][0, :, 0], inputs["k"][1, :, 1], inputs["k"][3]
    if paging:
        inputs = paged(None, inputs, 3)
        pages = inputs["block_table"].long()
        inputs["block_table"] = inputs["block_table"].clone()
        inputs["block_table"][3, :2] = torch.tensor([99, -1])  # where its two tokens would go
        want[3] = inputs["k_cache"][pages[3]].transpose(0, 1).flatten(1, 2)
    torch._dynamo.reset()
    torch.compile(append_kv, fullgraph=True, backend="aot_eager")(**inputs, backend=backend)
    got = inputs["k_cache"]
    if paging:
        got = got[pages].transpose(1, 2).flatten(2, 3)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["paged", "int8-paged", "strided"])
def test_raw_kernel_passes_opcheck(name):
    inputs = CASES[name].inputs(Draw(0, torch.float32))
    optional = dict.fromkeys(("block_table", "k_scale", "v_scale"))
    torch.library.opcheck(OPS["append_kv"].forward["cpu"], OPS["append_kv"].check(**optional | inputs))


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k_scale", "v_scale"])
def test_autograd_notices_the_write(backend, name):
    inputs = CASES["int8-odd" if name.endswith("scale") else "odd"].inputs(Draw(0, torch.float32))
    w = torch.ones_like(inputs[name], requires_grad=True)
    loss = (w * inputs[name]).sum()
    append_kv(**inputs, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_works_on_tensors_of_inference_mode(backend):
    with torch.inference_mode():
        inputs = _inputs()
        append_kv(**inputs, backend=backend)
        assert torch.equal(inputs["k_cache"][0, :, 3:5], inputs["k"][0])


@pytest.mark.parametrize("name", ["k", "v", "k_cache", "v_cache"])
def test_what_requires_a_gradient_is_refused_unless_gradients_are_off(backend, name):
    inputs = _inputs()
    inputs[name].requires_grad_()
    words = (
        f"append_kv: {name} must not require a gradient, there is no backward; call it under torch.no_grad"
    )
    with pytest.raises(NotImplementedError, match=words):
        append_kv(**inputs, backend=backend)
    with torch.no_grad():
        append_kv(**inputs, backend=backend)
    assert torch.equal(inputs["k_cache"][0, :, 3:5], inputs["k"][0])


def test_autocast_casts_to_a_floating_cache_and_quantises_what_it_gets(backend):
    inputs = _inputs()
    inputs |= {"k": inputs["k"].bfloat16(), "v": inputs["v"].bfloat16()}
    with pytest.raises(TypeError, match="k_cache must be torch.bfloat16 as k, or int8, got torch.float32"):
        append_kv(**inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        append_kv(**inputs, backend=backend)
    assert torch.equal(inputs["k_cache"][0, :, 3:5], inputs["k"][0].float())


def test_a_cache_of_scattered_columns_is_written_by_the_reference():
    inputs = _inputs()
    inputs["v_cache"] = torch.zeros(2, 2, 6, 9).transpose(2, 3)
    reason = "append_kv.cpu takes caches whose last dimension is contiguous, v_cache has stride 9"
    assert fastlm.explain("append_kv", **inputs).reasons["cpu"] == reason
    append_kv(**inputs)
    assert torch.equal(inputs["v_cache"][0, :, 3:5], inputs["v"][0])
    assert inputs["v_cache"].count_nonzero() == inputs["v"].numel()


def _zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


_INT8 = {"k_cache": _zeros(2, 2, 9, 4, dtype=torch.int8), "v_cache": _zeros(2, 2, 9, 6, dtype=torch.int8)}
BAD = [
    ({"k": 1}, TypeError, "k must be a tensor, got int"),
    ({"v": _zeros(2, 2, 4)}, ValueError, "v must be [batch, kv_heads, tokens, dim], got torch.float32"),
    ({"v": _zeros(2, 2, 2, 6).half()}, TypeError, "v must be torch.float32 on cpu as k, got torch.float16"),
    ({"k": _zeros(2, 1, 2, 4)}, ValueError, "k must have shape (2, 2, 2, 4) for k_cache, got (2, 1, 2, 4)"),
    ({"v": _zeros(2, 2, 3, 6)}, ValueError, "v must have shape (2, 2, 2, 6) for v_cache, got (2, 2, 3, 6)"),
    ({"k_cache": [1.0]}, TypeError, "k_cache must be a tensor, got list"),
    (
        {"k_cache": _zeros(2, 9, 4)},
        ValueError,
        "k_cache must be [batch or pages, kv_heads, slots, dim] with dim",
    ),
    (
        {"v_cache": _zeros(2, 2, 9, 0)},
        ValueError,
        "v_cache must be [batch or pages, kv_heads, slots, dim] with",
    ),
    (
        {"v_cache": _zeros(2, 2, 9, 6).to_sparse()},
        TypeError,
        "v_cache must be a dense tensor, got a torch.sparse",
    ),
    ({"v_cache": _INT8["v_cache"]}, TypeError, "v_cache must be torch.float32 as k_cache, got torch.int8"),
    (
        {"v_cache": _zeros(2, 2, 8, 6)},
        ValueError,
        "v_cache must have k_cache's (2, 2, 9) before its dim, got (2,",
    ),
    (
        {"k_cache": _zeros(3, 2, 9, 4), "v_cache": _zeros(3, 2, 9, 6)},
        ValueError,
        "k_cache must have k's batch 2,",
    ),
    ({"kv_lengths": [3, 0]}, TypeError, "kv_lengths must be an int32 tensor, got list"),
    ({"kv_lengths": torch.tensor([3, 0])}, TypeError, "kv_lengths must be an int32 tensor, got torch.int64"),
    (
        {"kv_lengths": _lengths(3)},
        ValueError,
        "kv_lengths must have shape [2] on cpu, got torch.int32 of shape",
    ),
    (
        {"block_table": _lengths(0, 1)},
        ValueError,
        "block_table must have shape [2, n] on cpu, got torch.int32",
    ),
    ({"block_table": _zeros(2, 1)}, TypeError, "block_table must be an int32 tensor, got torch.float32"),
    (_INT8, TypeError, "k_scale must be a tensor where the caches are int8, got None"),
    (_INT8 | {"k_scale": _zeros(2, 2, 9).half()}, TypeError, "k_scale must be float32, got torch.float16"),
    (
        _INT8 | {"k_scale": _zeros(2, 9)},
        ValueError,
        "k_scale must have shape (2, 2, 9) on cpu, one per token",
    ),
    ({"k_scale": _zeros(2, 2, 9)}, ValueError, "k_scale must be None where the caches are not int8, got"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named_before_anything_is_written(change, error, words):
    assert_told(append_kv, _inputs() | change, error, words)
