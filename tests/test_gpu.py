"""What only a GPU can show of the GPU backends: streams, CUDA graphs, no waiting, the same bits each time."""

import copy
import functools

import pytest
import torch

import fastlm
from fastlm import ops
from fastlm._op import OPS
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import leaves, moved, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
POINTS = [
    (name, backend) for name, op in OPS.items() for backend in ("cuda", "triton") if backend in op.backends
]


@functools.cache
def _inputs(name, backend, seed=0):
    """Of the first case that the backend takes; without its own draw of a dropout seed."""
    for case in cases_of(name, backend)[0]:
        given = moved(case.inputs(Draw(seed, torch.bfloat16)), "cuda")
        if fastlm.explain(name, **given).reasons[backend] is None:
            return given
    raise LookupError(f"{name}.{backend} refuses every case")


def _call(name, backend, given, cotangents):
    return run(getattr(ops, name), leaves(given, cases_of(name)[1]), cotangents, backend=backend)


def _like(given):
    """Room of its own for tensors like these: what was one tensor is one."""
    made = {}
    for value in given.values():
        if isinstance(value, torch.Tensor) and id(value) not in made:
            made[id(value)] = value.clone(memory_format=torch.preserve_format)
    return {n: made.get(id(value), value) for n, value in given.items()}


def _same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name


@pytest.mark.parametrize(("name", "backend"), POINTS)
def test_two_calls_give_the_same_bits(name, backend):
    given, cotangents = _inputs(name, backend), []
    _same(_call(name, backend, given, cotangents), _call(name, backend, given, cotangents))


@pytest.mark.parametrize(("name", "backend"), POINTS)
def test_nothing_waits_for_the_gpu(name, backend):
    given, cotangents = _inputs(name, backend), []
    _call(name, backend, given, cotangents)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _call(name, backend, given, cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "backend"), POINTS)
def test_it_runs_on_the_current_stream(name, backend):
    given, cotangents = _inputs(name, backend), []
    expected = _call(name, backend, given, cotangents)
    late = _like(given)
    floating = [
        (late[n], v) for n, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()
    ]
    for to, _ in floating:
        to.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # 10 ms: a kernel on another stream would read the NaN
        for to, value in floating:
            to.copy_(value)
        found = _call(name, backend, late, cotangents)
        torch.cuda.current_stream().synchronize()
    _same(found, expected)


@pytest.mark.parametrize(("name", "backend"), POINTS)
def test_a_cuda_graph_computes_anew_at_each_replay(name, backend):
    cotangents: list[torch.Tensor] = []
    first, second = (_inputs(name, backend, seed) for seed in (0, 1))
    static = _like(first)
    expected = [_call(name, backend, given, cotangents) for given in (first, second)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _call(name, backend, static, cotangents)
    for given, values in zip((first, second), expected, strict=True):
        for n, value in given.items():
            if isinstance(value, torch.Tensor):
                static[n].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        _same(found, values)


@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_decoding_takes_no_memory_from_the_device_after_its_first_call(backend):
    given = _inputs("decode_attention", backend)
    ops.decode_attention(**given, backend=backend)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(3):
        ops.decode_attention(**given, backend=backend)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


@pytest.mark.parametrize("backend", ("cuda", "triton"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_the_mask_of_dropout_is_that_of_the_cpu_kernel(backend, dtype):
    x = torch.randn(37, 130).to(dtype)
    options = {"dropout_p": 0.3, "seed": 5}
    expected = ops.dropout_add(x, **options, backend="cpu")
    assert torch.equal(ops.dropout_add(x.cuda(), **options, backend=backend).cpu(), expected)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_float32_gradient_of_the_loss_scales_bfloat16s_in_float32(kept, backend):
    draw = Draw(0, torch.float32, "cuda")
    x, w, target = draw.normal(200, 64), draw.normal(300, 64), draw.integers(0, 300, 200)
    x, w = x.requires_grad_(), (w * 0.125).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):  # the loss is float32, and so is its gradient
        loss = ops.linear_cross_entropy(x, w, target, backend=backend)
    third = torch.tensor(1 / 3, device="cuda")  # as bfloat16 it is 0.2% larger
    found = torch.autograd.grad(loss, (x, w), third, retain_graph=kept)
    plain = torch.nn.functional.cross_entropy(x @ w.T, target)
    for got, wanted in zip(found, torch.autograd.grad(plain, (x, w), third), strict=True):
        assert (got * wanted).sum() / wanted.square().sum() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_a_compiled_function_is_one_graph_and_gives_the_same(backend):
    def block(x, weight, gate):
        with_weight = ops.rms_norm(x, weight, backend=backend)
        return ops.glu(gate, with_weight, backend=backend)

    given = [torch.randn(*s, device="cuda", requires_grad=True) for s in ((33, 96), (96,), (33, 96))]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    outputs = [f(*given) for f in (block, compiled)]
    gradients = [torch.autograd.grad(o.square().sum(), given) for o in outputs]
    torch.testing.assert_close(outputs[1], outputs[0])
    for found, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(found, expected)


def test_patched_gpt_decodes_and_trains_like_the_plain_one():
    from fastlm.examples.plain_gpt import PlainGPT

    torch.manual_seed(0)
    plain = PlainGPT(101, 64, 2, 2, 48, 0.0).cuda()
    patched = copy.deepcopy(plain)
    fastlm.patch(patched)
    tokens = torch.randint(101, (3, 48), device="cuda")
    losses = []
    for model in (plain, patched):
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for (n, p), q in zip(plain.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=n)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize(("name", "backend"), POINTS)
def test_it_runs_on_the_device_of_its_tensors(name, backend):
    given, cotangents = _inputs(name, backend), []
    expected = _call(name, backend, given, cotangents)
    there = {n: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    found = _call(name, backend, there, [c.to("cuda:1") for c in cotangents])
    _same({n: v.to("cuda:0") for n, v in found.items()}, expected)
