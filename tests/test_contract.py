"""What every op owes to PyTorch: torch.compile, opcheck, double backward, checkpointing, threads."""

import pickle
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm._op import OPS
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import KernelCalls, judge, leaves, outputs_of, run

CASES = [pytest.param(n, c, id=f"{n}-{c.name}") for n in OPS for c in cases_of(n)[0] if c.name != "nan"]
MATMULS = ("attention", "attention_varlen", "feed_forward")  # contain a matrix product
SMALL = [
    pytest.param(n, c, id=f"{n}-{c.name}")
    for n in OPS
    for c in cases_of(n)[0]
    if c.name in ("row", "odd", "plain", "residual-dropout")
]
WITH_MATMUL = ("feed_forward", "linear_cross_entropy")
WITH_BACKWARD = [point for point in SMALL if OPS[point.values[0]].backward]


def tensors_of(values) -> list:
    return [v for v in values if isinstance(v, torch.Tensor)]


def compiled_equals_eager(name, case, backend):
    public, differentiable = getattr(ops, name), cases_of(name)[1]
    inputs = case.inputs(Draw(0, torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(public, fullgraph=True, backend=backend)
    cotangents: list = []
    eager = run(public, leaves(inputs, differentiable), cotangents)
    got = run(compiled, leaves(inputs, differentiable), cotangents)
    assert all(torch.equal(got[k].nan_to_num(7), eager[k].nan_to_num(7)) for k in eager)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_torch_compile_traces_it_whole(name, case):
    compiled_equals_eager(name, case, "aot_eager")


def test_torch_compile_takes_one_tensor_as_several_arguments():
    x = Draw(0, torch.float32).normal(1, 2, 5, 8).requires_grad_()

    def call(x):
        return ops.attention(x.detach(), x, x)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, got = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (call, compiled))
    assert torch.equal(eager, got)


@pytest.mark.parametrize("name", OPS)
def test_inductor_runs_the_same_kernel(name):
    compiled_equals_eager(name, cases_of(name)[0][1], "inductor")


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_opcheck_finds_nothing_in_the_forward_kernel(name, case):
    raw = OPS[name].check(**arguments_of(name, case.inputs(Draw(0, torch.float32))))
    torch.library.opcheck(OPS[name].forward["cpu"], raw)


def arguments_of(name, inputs):
    """The public arguments with their defaults, without backend."""
    import inspect

    bound = inspect.signature(getattr(ops, name)).bind(**inputs)
    bound.apply_defaults()
    return {k: v for k, v in bound.arguments.items() if k != "backend"}


@pytest.mark.parametrize(("name", "case"), WITH_BACKWARD)
def test_opcheck_finds_nothing_in_the_backward_kernel(name, case):
    op = OPS[name]
    raw = op.check(**arguments_of(name, case.inputs(Draw(0, torch.float32))))
    outputs = op.forward["cpu"](*raw)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.ones_like(o) for o in outputs[: op.public]]
    known = [*gradients, *raw, *outputs]
    values = [[True] * len(op.wanted) if s == -1 else known[s] for s in op.sources]
    torch.library.opcheck(op.backward["cpu"], tuple(values))


@pytest.mark.parametrize(("name", "case"), WITH_BACKWARD)
def test_double_backward_is_the_references(name, case):
    public, differentiable = getattr(ops, name), cases_of(name)[1]
    found = []
    for backend, dtype in (("cpu", None), ("reference", None), ("reference", torch.float64)):
        draws = (case.inputs(Draw(seed, torch.float32)) for seed in range(3))
        second = [second_derivatives(public, leaves(d, differentiable, dtype), backend) for d in draws]
        found.append([None if same[0] is None else torch.stack(same) for same in zip(*second, strict=True)])
    for got, low, ref in zip(*found, strict=True):
        if ref is not None:
            verdict = judge("second derivative", got, low, ref)
            assert verdict.ratio <= 1, verdict


def second_derivatives(public, inputs, backend):
    wanted = [t for t in tensors_of(inputs.values()) if t.requires_grad]
    outputs = tensors_of(run(public, inputs, backend=backend).values())
    loss = sum(o.square().sum() for o in outputs if o.requires_grad)
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].backward])
def test_backward_refuses_what_torch_refuses(name):
    inputs = leaves(cases_of(name)[0][1].inputs(Draw(0, torch.float32)), cases_of(name)[1])
    first = next(iter(inputs))
    changed = inputs | {first: inputs[first] * 1}
    output = tensors_of(run(getattr(ops, name), changed).values())[0].sum()
    output.backward(retain_graph=True)
    output.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward()
    output = tensors_of(run(getattr(ops, name), changed).values())[0].sum()
    changed[first].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("name", [n for n in OPS if "dropout_p" in OPS[n].arguments])
def test_activation_checkpointing_repeats_the_dropout_mask(name):
    inputs = leaves(cases_of(name)[0][1].inputs(Draw(0, torch.float32)), cases_of(name)[1])
    inputs |= {"dropout_p": 0.5, "seed": None}
    wanted = [t for t in tensors_of(inputs.values()) if t.requires_grad]

    def gradients(call):
        torch.manual_seed(3)
        outputs = tensors_of(run(call, inputs).values())
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), wanted)

    public = getattr(ops, name)
    plain = gradients(public)
    again = gradients(lambda **kw: checkpoint(public, use_reentrant=False, **kw))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_vmap_runs_the_reference(name):
    inputs = cases_of(name)[0][1].inputs(Draw(0, torch.float32))
    inputs.pop("dropout_p", None), inputs.pop("seed", None)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]
    public, rest = getattr(ops, name), {k: v for k, v in inputs.items() if k not in names}

    def call(*tensors):
        return outputs_of(public, dict(zip(names, tensors, strict=True)) | rest)

    stacked = [torch.stack([inputs[n], inputs[n].clone()]) for n in names]
    with KernelCalls() as calls:
        mapped = torch.vmap(call)(*stacked)
    assert calls.names == []
    one = call(*(inputs[n] for n in names))
    for m, o in zip(mapped, one, strict=True):
        assert m.shape == (2, *o.shape)
        torch.testing.assert_close(m[0], o)


@pytest.mark.parametrize("name", OPS)
def test_it_pickles(name):
    assert pickle.loads(pickle.dumps(getattr(ops, name))) is getattr(ops, name)


@pytest.mark.parametrize("name", OPS)
def test_two_threads_at_once_compute_what_one_does(name):
    public, differentiable = getattr(ops, name), cases_of(name)[1]
    inputs = cases_of(name)[0][1].inputs(Draw(0, torch.float32))
    cotangents: list = []
    alone = run(public, leaves(inputs, differentiable), cotangents)
    found = [None, None]

    def work(i):
        for _ in range(20):
            found[i] = run(public, leaves(inputs, differentiable), list(cotangents))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.equal(f[k], alone[k]) for f in found for k in alone)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_bits_do_not_depend_on_the_number_of_threads(name, case):
    if name in WITH_MATMUL:
        return  # the matmuls are torch's own
    public, differentiable = getattr(ops, name), cases_of(name)[1]
    inputs, cotangents = case.inputs(Draw(0, torch.float32)), []
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run(public, leaves(inputs, differentiable), cotangents))
    torch.set_num_threads(threads)
    assert all(torch.equal(f[k].nan_to_num(7), found[0][k].nan_to_num(7)) for f in found for k in f)


@pytest.mark.parametrize("name", OPS)
def test_the_reference_traces_whole_under_autocast(name):
    inputs = cases_of(name)[0][1].inputs(Draw(0, torch.float32))
    public = getattr(ops, name)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return outputs_of(public, inputs, backend="reference")

    torch._dynamo.reset()
    eager, compiled = call(), torch.compile(call, fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_autocast_runs_the_kernel_and_casts_only_what_contains_a_matmul(name):
    inputs = cases_of(name)[0][1].inputs(Draw(0, torch.float32))
    with torch.autocast("cpu", torch.bfloat16), KernelCalls() as calls:
        first = outputs_of(getattr(ops, name), inputs)[0]
    assert first.dtype == (torch.bfloat16 if name in MATMULS else torch.float32)
    assert f"{name}.cpu" in calls.names


def subnormal(t):
    return (t != 0) & (t.abs() < torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].backward and n not in WITH_MATMUL])
def test_tiny_gradients_come_out_flushed_to_zero(name):
    """Each of them is subnormal somewhere in the reference, which flushes nothing."""
    cases, differentiable = cases_of(name)
    case = next((c for c in cases if c.name == "odd"), cases[0])
    inputs = leaves(case.inputs(Draw(0, torch.float32)), differentiable)
    inputs.pop("residual", None)  # of dropout_add: its gradient is dy itself, which no kernel touches
    wanted = [t for t in tensors_of(inputs.values()) if t.requires_grad]
    found, cotangents = [], None
    for backend in ("cpu", "reference"):
        outputs = [o for o in outputs_of(getattr(ops, name), inputs, backend=backend) if o.requires_grad]
        if cotangents is None:  # around the smallest normal number
            sizes = [torch.finfo(torch.float32).tiny * (0.1 + 4 * torch.rand_like(o)) for o in outputs]
            cotangents = [s * torch.randn_like(s).sign() for s in sizes]
        found.append(torch.autograd.grad(outputs, wanted, cotangents))
    assert all(subnormal(g).any() for g in found[1])
    assert not any(subnormal(g).any() for g in found[0])
