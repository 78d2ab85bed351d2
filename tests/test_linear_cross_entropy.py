"""linear_cross_entropy beyond its cases: meaning, chunks, memory, gradients computed in forward."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm._ops import linear_cross_entropy as module
from fastlm.ops import linear_cross_entropy
from fastlm.testing.cases import DTYPES
from fastlm.testing.compare import KernelCalls, judge

REDUCTIONS = ("none", "sum", "mean")
BACKWARD = "linear_cross_entropy_backward.cpu"


def inputs(rows=9, size=24, classes=41, dtype=torch.float32):
    """(x, weight, bias, target) that want gradients; the logits are of size 1."""
    torch.manual_seed(0)
    tensors = torch.randn(rows, size), torch.randn(classes, size) * size**-0.5, torch.randn(classes)
    return *(t.to(dtype).requires_grad_() for t in tensors), torch.randint(0, classes, (rows,))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_the_reference_is_torchs_two_steps_in_float64(label_smoothing, reduction):
    x, w, b, target = inputs(dtype=torch.float64)
    target[::4] = -100
    options = dict(label_smoothing=label_smoothing, reduction=reduction)
    got = linear_cross_entropy(x, w, target, bias=b, **options)
    wanted = F.cross_entropy(F.linear(x, w, b), target, **options)
    dloss = torch.randn_like(wanted)
    torch.testing.assert_close(got, wanted)
    found, expected = (torch.autograd.grad(loss, (x, w, b), dloss) for loss in (got, wanted))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_and_second_derivatives_of_the_reference_are_right(reduction):
    x, w, b, target = inputs(4, 3, 6, torch.float64)
    target[1] = -100

    def call(*tensors):
        options = dict(label_smoothing=0.2, z_loss=0.3, reduction=reduction)
        return linear_cross_entropy(*tensors[:2], target, bias=tensors[2], **options)

    assert torch.autograd.gradcheck(call, (x, w, b)) and torch.autograd.gradgradcheck(call, (x, w, b))


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1025])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", [False, True])
def test_it_equals_cross_entropy_of_the_product_on_both_sides_of_a_chunk(ignored, reduction, rows):
    x, w, b, target = inputs(rows, 24, 1030)  # classes: one more block of the matmul, ended early
    if ignored:
        target[1::3] = -100  # left out of the matmuls: what is computed has to find its rows again
    got = linear_cross_entropy(x, w, target, bias=b, reduction=reduction)
    dloss = torch.randn_like(got)
    found = got, *torch.autograd.grad(got, (x, w, b), dloss)
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        logits = F.linear(*tensors)
        loss = ops.cross_entropy(logits, target, reduction=reduction, backend="reference")
        results.append((loss, *torch.autograd.grad(loss, tensors, dloss.to(dtype))))
    for name, g, low, ref in zip(("loss", "dx", "dweight", "dbias"), found, *results, strict=True):
        verdict = judge(name, g, low, ref)
        assert verdict.ratio <= 1, verdict


@pytest.mark.parametrize(
    ("classes", "chunks"),
    [
        (7, []),
        (7, [1]),
        (7, [512]),
        (7, [257, 256]),
        (7, [500] * 10),
        (1 << 17, [512]),
        ((1 << 17) + 1, [256, 256]),  # at most 511 rows each
        (1 << 20, [33, 32]),
    ],
)
def test_chunks_cover_all_rows_evenly_and_within_their_bounds(classes, chunks):
    x, w, target = torch.ones(sum(chunks), 1), torch.ones(classes, 1), torch.zeros(sum(chunks)).long()
    with torch.profiler.profile(record_shapes=True) as profile:
        linear_cross_entropy(x, w, target)
    products = [e.input_shapes[:2] for e in profile.events() if e.name == "aten::mm"]
    blocks = [min(1024, classes - begin) for begin in range(0, classes, 1024)]
    assert products == [[[rows, 1], [1, block]] for rows in chunks for block in blocks]


def peak_of(call) -> int:
    """The most bytes that torch's CPU allocator held during call() beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        kept = call()
    del kept
    held = peak = 0
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_beyond_inputs_and_gradients_is_a_third_of_eagers_at_most(reduction):
    x, w, _, target = inputs(1024, 16, 3000)
    returned = 4 * (x.numel() + w.numel())

    def run(loss):
        return torch.autograd.grad(loss.sum(), (x, w))

    eager = peak_of(lambda: run(F.cross_entropy(F.linear(x, w), target, reduction=reduction)))
    ours = peak_of(lambda: run(linear_cross_entropy(x, w, target, reduction=reduction)))
    logits = 4 * 1024 * 3000
    assert eager - returned > 2 * logits  # the measurement sees what eager makes
    assert ours - returned <= (eager - returned) / 3


@pytest.mark.parametrize("kept", [False, True])
def test_a_float32_gradient_of_the_loss_scales_bfloat16s_in_float32(kept):
    x, w, _, target = inputs(200, 64, 300)
    with torch.autocast("cpu", torch.bfloat16):  # the loss is float32, and so is its gradient
        loss = linear_cross_entropy(x, w, target)
    third = torch.tensor(1 / 3)  # as bfloat16 it is 0.2% larger
    found = torch.autograd.grad(loss, (x, w), third, retain_graph=kept)
    plain = F.cross_entropy(F.linear(x, w), target)
    for got, wanted in zip(found, torch.autograd.grad(plain, (x, w), third), strict=True):
        assert (got * wanted).sum() / wanted.square().sum() == pytest.approx(1, abs=5e-4)


def test_without_gradients_no_gradient_is_computed():
    x, w, b, target = inputs(600, 24, 900)
    with torch.no_grad():
        peak = peak_of(lambda: linear_cross_entropy(x, w, target, bias=b))
    assert 4 * 300 * 900 <= peak < 4 * 300 * 900 + 40_000  # two chunks; dx and dweight would be 144 KB


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("x", "weight")])
def test_some_gradients_are_the_same_gradients(wanted, reduction):
    x, w, b, target = inputs()
    every = {"x": x, "weight": w, "bias": b}
    loss = linear_cross_entropy(**every, target=target, reduction=reduction).sum()
    expected = dict(zip(every, torch.autograd.grad(loss, every.values()), strict=True))
    some = {n: t.detach().requires_grad_(n in wanted) for n, t in every.items()}
    loss = linear_cross_entropy(**some, target=target, reduction=reduction).sum()
    got = torch.autograd.grad(loss, [some[n] for n in wanted])
    assert all(torch.equal(g, expected[n]) for n, g in zip(wanted, got, strict=True))


def test_gradients_that_forward_did_not_foresee_are_computed_in_backward():
    x, w, b, target = inputs()
    *raw, widened, early = module.check(x.detach(), w, target, b, -100, 0.0, 0.0, "mean")
    assert early == [False, True, True]
    with torch.no_grad():
        loss, *units = module.OP.forward["cpu"](*raw, widened, early)
        assert [u.shape for u in units] == [(0,), w.shape, b.shape]
        found = module.OP.backward["cpu"](torch.tensor(0.5), *raw[:4], *units, *raw[4:], early, [True] * 3)
    expected = torch.autograd.grad(linear_cross_entropy(x, w, target, bias=b), (x, w, b), torch.tensor(0.5))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dloss", [1.0, 0.37, 0.0])
def test_a_kept_graph_gives_the_same_gradients_again_whatever_was_done_to_the_first(dloss, dtype):
    x, w, b, target = inputs(dtype=dtype)
    loss = linear_cross_entropy(x, w, target, bias=b)
    dloss = torch.tensor(dloss, dtype=dtype)
    with KernelCalls() as calls:
        first = torch.autograd.grad(loss, (x, w, b), dloss, retain_graph=True)
        copies = [g.clone() for g in first]
        [g.zero_() for g in first]
        assert calls.names == [BACKWARD]
        last = torch.autograd.grad(loss, (x, w, b), dloss)
    assert calls.names == [BACKWARD]  # the graph ends: what forward computed is scaled in place
    assert all(map(torch.equal, copies, last))


def test_backward_into_leaves_copies_no_gradient():
    x, w, _, target = inputs(8, 64, 4096)
    loss = linear_cross_entropy(x, w, target)
    held = peak_of(lambda: (loss / 3).backward())
    assert held < 4 * w.numel() / 2 and w.grad.shape == w.shape


def test_float16_gradients_survive_the_scaling_of_the_loss():
    x, w, _, target = inputs(64, 24, 9000)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(x, w, target)
    found = torch.autograd.grad(loss * 65536.0, (x, w))
    exact = [t.detach().half().double().requires_grad_() for t in (x, w)]
    expected = torch.autograd.grad(linear_cross_entropy(*exact, target) * 65536.0, exact)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2**-10, atol=2**-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_a_row_that_counts_loss_and_gradients_are_zero(backend, rows, reduction, dtype):
    x, w, b, _ = inputs(rows, dtype=dtype)
    x.detach().fill_(float("nan"))
    target = torch.full((rows,), -100)
    loss = linear_cross_entropy(x, w, target, bias=b, z_loss=0.1, reduction=reduction, backend=backend)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), (x, w, b)))


@pytest.mark.parametrize("bad", [-1, 41, 2**62])
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_a_target_out_of_range_is_an_index_error(backend, bad):
    x, w, b, target = inputs()
    target[3] = bad
    message = rf"linear_cross_entropy: target must be in \[0, 41\) or ignore_index=-100, got {bad}"
    with KernelCalls() as calls, pytest.raises(IndexError, match=message):
        linear_cross_entropy(x, w, target, bias=b, backend=backend)
    assert calls.names == []


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_and_scales_what_forward_computed(compiler, reduction):
    x, w, b, target = inputs()

    def call(x, w, b):
        return (linear_cross_entropy(x, w, target, bias=b, reduction=reduction) * 0.3).sum()

    expected = torch.autograd.grad(call(x, w, b), (x, w, b))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    assert all(map(torch.equal, torch.autograd.grad(compiled(x, w, b), (x, w, b)), expected))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_under_compile_a_bad_target_spoils_its_own_row_only(backend):
    x, w, b, target = inputs(4)
    target[1:3] = torch.tensor([41, -(2**63)])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x, target):
        return linear_cross_entropy(x, w, target, bias=b, reduction="none", backend=backend)

    loss = call(x, target)
    (dx,) = torch.autograd.grad(loss, x, torch.ones(4))
    assert loss[1:3].isnan().all() and (dx[1:3] == 0).all()
    torch.testing.assert_close(
        loss[::3], F.cross_entropy(F.linear(x, w, b), target.clamp(0, 40), reduction="none")[::3]
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(backend, dtype):
    x, w, b, target = inputs()
    with torch.autocast("cpu", dtype):
        got = linear_cross_entropy(x, w, target, bias=b, backend=backend)
        assert got.dtype == F.cross_entropy(F.linear(x, w, b), target).dtype == torch.float32
    by_hand = linear_cross_entropy(x.to(dtype), w.to(dtype), target, bias=b.to(dtype), backend=backend)
    assert by_hand.dtype == dtype and torch.equal(got.to(dtype), by_hand)
    grads = torch.autograd.grad(got, (x, w, b))
    assert all(map(torch.equal, grads, torch.autograd.grad(by_hand, (x, w, b))))
    assert {g.dtype for g in grads} == {torch.float32}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_own_products_are_not_cast_under_autocast(dtype, reduction):
    x, w, b, target = inputs(dtype=dtype)
    target[::3] = -100
    loss = linear_cross_entropy(x, w, target, bias=b, reduction=reduction)
    dloss = torch.randn_like(loss)
    expected = torch.autograd.grad(loss, (x, w, b), dloss, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, (x, w, b), dloss, retain_graph=True)
        raw = module.OP.forward["cpu"](x, w, b, target, -100, 0.0, 0.0, reduction, False, [False] * 3)
    assert all(map(torch.equal, found, expected)) and torch.equal(raw[0], loss)


@pytest.mark.parametrize("deviation", [20.0, 30.0])
def test_a_confident_models_gradients_hold_no_denormals(deviation):
    def denormals(t):
        return int(((t != 0) & (t.abs() < torch.finfo(torch.float32).tiny)).sum())

    x, w, _, target = inputs(64, 128, 2000)
    w = (w.detach() * deviation).requires_grad_()
    logits = (x @ w.T).detach().requires_grad_()
    target[::2] = logits[::2].argmax(-1)  # half of the rows are sure and right, half sure and wrong
    assert denormals(*torch.autograd.grad(F.cross_entropy(logits, target), logits)) > 0.1 * logits.numel()
    assert denormals(*torch.autograd.grad(ops.cross_entropy(logits, target), logits)) == 0
    found = torch.autograd.grad(linear_cross_entropy(x, w, target), (x, w))
    assert [denormals(g) for g in found] == [0, 0]
