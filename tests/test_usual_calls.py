"""A usual call runs wholly in C++ and computes what the checked way computes; every other call is checked."""

import importlib
import subprocess
import sys
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

import fastlm
from fastlm import _load, ops
from fastlm._op import OPS
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import KernelCalls

ROOT = Path(__file__).parents[1]
NAMES = [n for n in OPS if hasattr(_load.USUAL, n)]


class Subclass(Tensor):
    """A tensor of another class."""


def usual(dtype=torch.float32) -> dict[str, dict]:
    """Arguments of one usual call of each op."""

    def t(*shape):
        return torch.randn(shape).to(dtype)

    x, cos = t(3, 16), t(4, 8)
    q, k, v = t(2, 4, 3, 8), t(2, 2, 3, 8), t(2, 2, 3, 5)
    lengths, target = torch.tensor([1, 3], dtype=torch.int32), torch.tensor([2, -100, 15])
    starts = torch.tensor([0, 1, 6], dtype=torch.int32)
    packed = {"q": t(6, 4, 8), "k": t(6, 2, 8), "v": t(6, 2, 5), "cu_seqlens_q": starts}
    caches = {"k_cache": t(2, 2, 7, 8), "v_cache": t(2, 2, 7, 5), "kv_lengths": lengths}
    return {
        "layer_norm": {"x": x, "weight": t(16), "bias": torch.randn(16), "residual": t(3, 16)},
        "rms_norm": {"x": x, "weight": t(16), "weight_offset": 1.0, "residual": t(3, 16)},
        "bias_act": {"x": x, "bias": torch.randn(16), "activation": "silu"},
        "glu": {"gate": x, "up": t(3, 16), "activation": "gelu"},
        "softmax": {"x": t(3, 3), "scale": 0.5, "causal": True},
        "cross_entropy": {"logits": x, "target": target, "label_smoothing": 0.25},
        "linear_cross_entropy": {"x": x, "weight": t(17, 16), "target": target, "bias": t(17), "z_loss": 0.1},
        "dropout_add": {"x": x, "residual": t(3, 16)},
        "rope": {"x": q, "cos": t(3, 8), "sin": cos[:3]},
        "attention": {"q": q, "k": k, "v": v, "causal": True, "kv_lengths": lengths},
        "attention_varlen": packed | {"cu_seqlens_k": starts, "max_q": 5, "max_k": 5, "causal": True},
        "decode_attention": {"q": q, **caches, "scale": 0.5},
        "append_kv": {"k": k, "v": v, **caches},
        "feed_forward": {"x": x, "w1": t(8, 16), "b1": t(8), "w2": t(5, 8), "b2": t(5), "activation": "relu"},
    }


@contextmanager
def watched(name):
    """Gives a list of whether each call of an op inside it was a usual one."""
    taken, original = [], OPS[name].usual

    def asked(*arguments):
        found = original(*arguments)
        taken.append(found is not None)
        return found

    OPS[name].usual = asked
    try:
        yield taken
    finally:
        OPS[name].usual = original


def tensors_of(value) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, laid out alike, one with a graph where the other has one."""
    alike = (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
    return (
        alike
        and type(a) is type(b)
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def copied(arguments: dict) -> dict:
    """The arguments with caches of their own, for an op that writes into them."""
    return {
        n: a.clone() if n in ("k_cache", "v_cache") and isinstance(a, Tensor) else a
        for n, a in arguments.items()
    }


def outcome(name, arguments, backend=None):
    """What a call returns, and what is in its caches then; or the class and the words of its error."""
    arguments = copied(arguments)
    try:
        found = getattr(ops, name)(**arguments, backend=backend)
    except Exception as error:
        return type(error), str(error)
    return type(found), [*tensors_of(found), *(a for n, a in arguments.items() if n.endswith("_cache"))]


def assert_same(got, wanted):
    assert got[0] is wanted[0]
    if isinstance(wanted[1], str):
        assert got[1] == wanted[1]
    else:
        assert len(got[1]) == len(wanted[1])
        assert all(map(same, got[1], wanted[1]))


def checked(name, arguments):
    """The outcome of the longer way."""
    original, OPS[name].usual = OPS[name].usual, lambda *_: None
    try:
        return outcome(name, arguments)
    finally:
        OPS[name].usual = original


def assert_unusual(name, arguments):
    """The call takes the longer way, and what comes of it is what always did."""
    with watched(name) as taken:
        got = outcome(name, arguments)
    assert taken in ([], [False])
    assert_same(got, checked(name, arguments))


def test_the_library_has_a_builtin_for_every_small_op():
    assert _load.MISSING["cpu"] is not None or set(NAMES) == set(usual())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_usual_call_never_reaches_the_checks(name, dtype, monkeypatch):
    arguments = usual(dtype)[name]
    wanted = checked(name, arguments)

    def reached(*_):
        raise AssertionError("the checks were reached")

    monkeypatch.setattr(sys.modules[f"fastlm._ops.{name}"], "check", reached)
    for mode in (torch.inference_mode, torch.no_grad, nullcontext):
        with mode():
            assert_same(outcome(name, arguments), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_usual_call_is_seen_as_any_other_call_of_an_op(name):
    with torch.profiler.profile() as profile:
        outcome(name, usual()[name])
    assert f"fastlm::{name}" in {event.key for event in profile.key_averages()}


def gradients(name, arguments, differentiable):
    """An outcome, and the gradients of the tensors among `differentiable`."""
    leaves = [arguments[n] for n in differentiable if isinstance(arguments.get(n), Tensor)]
    found = outcome(name, arguments)
    outputs = [] if isinstance(found[1], str) else [t for t in found[1] if t.requires_grad]
    if not outputs:
        return found, []
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)
    return found, [g for g in grads if g is not None]


def every_case():
    return [(n, c, d) for n in NAMES for c in cases_of(n)[0] for d in c.dtypes]


@pytest.mark.parametrize(("name", "case", "dtype"), every_case(), ids=lambda v: getattr(v, "name", str(v)))
def test_every_case_gives_the_same_bits_either_way(name, case, dtype, monkeypatch):
    differentiable = cases_of(name)[1]
    with torch.no_grad():
        got = outcome(name, case.inputs(Draw(0, dtype)))
        assert_same(got, checked(name, case.inputs(Draw(0, dtype))))
    del got
    if not differentiable:
        return
    leaves = {
        n: a.detach().requires_grad_() if n in differentiable and isinstance(a, Tensor) else a
        for n, a in case.inputs(Draw(0, dtype)).items()
    }
    got, wanted = gradients(name, leaves, differentiable), None
    monkeypatch.setattr(OPS[name], "usual", lambda *_: None)
    wanted = gradients(name, leaves, differentiable)
    assert_same(got[0], wanted[0])
    assert len(got[1]) == len(wanted[1]) and all(map(same, got[1], wanted[1]))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_usual_and_get_gradients(name):
    arguments, differentiable = usual()[name], cases_of(name)[1]
    parameters = {n: torch.nn.Parameter(a) if n in differentiable else a for n, a in arguments.items()}
    with watched(name) as taken:
        found, grads = gradients(name, parameters, differentiable)
    assert taken == [True]
    assert len(grads) == len([n for n in differentiable if n in arguments])


def first(arguments: dict) -> str:
    return next(iter(arguments))


def tensor_names(arguments: dict) -> list[str]:
    return [n for n, a in arguments.items() if isinstance(a, Tensor)]


CHANGES = {
    "subclass": lambda t: t.as_subclass(Subclass),
    "float64": lambda t: t.double(),
    "other_integers": lambda t: t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "one_more_axis": lambda t: t[None],
    "one_less_axis": lambda t: t[0],
    "one_more_column": lambda t: torch.cat([t, t[..., :1]], -1),
    "one_more_row": lambda t: torch.cat([t, t[:1]]),
    "0-d": lambda t: t.flatten()[0],
    "not_a_tensor": lambda t: t.tolist(),
    "negated": lambda t: torch._neg_view(t) if t.is_floating_point() else -t,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # of complex numbers that become real ones
def test_a_changed_tensor_is_checked_or_gives_the_same(name, change):
    for argument in tensor_names(usual()[name]):
        arguments = usual()[name]
        arguments[argument] = CHANGES[change](arguments[argument])
        with watched(name) as taken:
            got = outcome(name, arguments)
        wanted = checked(name, arguments)
        if got[0] is not torch.Tensor or not got[1][0].is_meta:  # nothing to compare
            assert_same(got, wanted)
        if isinstance(wanted[1], str) or change in ("subclass", "float64", "meta", "sparse", "not_a_tensor"):
            assert taken == [False]


@pytest.mark.parametrize("change", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_mixed_types_give_the_same_as_before(name, change):
    for dtype in (torch.float32, torch.float16):
        for argument in tensor_names(usual()[name]):
            arguments = usual(dtype)[name]
            if arguments[argument].is_floating_point():
                arguments[argument] = arguments[argument].to(change)
                assert_same(outcome(name, arguments), checked(name, arguments))


@pytest.mark.parametrize("name", NAMES)
def test_any_strides_give_the_same_as_before(name):
    for argument in tensor_names(usual()[name]):
        arguments = usual()[name]
        t = arguments[argument]
        for strided in (
            t.transpose(0, -1).contiguous().transpose(0, -1),
            t[..., :1].expand_as(t),
            torch.stack([t, t], -1)[..., 0],
        ):
            arguments[argument] = strided
            if argument.endswith("_cache"):
                continue  # outcome() copies them
            assert_same(outcome(name, arguments), checked(name, arguments))


NUMBERS = {
    "layer_norm": ("eps", "dropout_p"),
    "rms_norm": ("eps", "weight_offset", "dropout_p"),
    "bias_act": ("dropout_p", "activation"),
    "glu": ("activation",),
    "softmax": ("scale", "causal", "mask"),
    "cross_entropy": ("ignore_index", "label_smoothing", "z_loss", "reduction"),
    "linear_cross_entropy": ("bias", "ignore_index", "label_smoothing", "z_loss", "reduction"),
    "dropout_add": ("dropout_p",),
    "rope": ("interleaved",),
    "attention": ("scale", "softcap", "dropout_p", "causal", "return_lse", "window", "mask", "bias"),
    "attention_varlen": ("scale", "softcap", "dropout_p", "causal", "return_lse", "window", "max_q", "max_k"),
    "decode_attention": ("scale", "softcap", "return_lse", "window", "block_table", "k_scale"),
    "append_kv": ("block_table", "k_scale"),
    "feed_forward": ("activation", "dropout_p", "b1", "b2"),
}
SEEDED = ("layer_norm", "rms_norm", "bias_act", "dropout_add", "attention", "attention_varlen", "feed_forward")
VALUES = (
    *(float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 0.0, 1e300, 1.0, 2.0),
    *(True, False, 0, 1, -1, 2**70, "1", "mean", "gelu", "none", "top_left", "bottom_right", "\ud800"),
    *(None, [], (1, 0), torch.tensor(1.0), torch.tensor(True), torch.float32),
)


@pytest.mark.parametrize("name", NAMES)
def test_any_value_of_a_number_gives_the_same_as_before(name):
    for argument in NUMBERS[name]:
        for value in VALUES:
            arguments = usual()[name] | {argument: value}
            if name in SEEDED:
                arguments["seed"] = 7
            assert_same(outcome(name, arguments), checked(name, arguments))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("layer_norm", {"eps": float("nan")}),
        ("layer_norm", {"eps": -1.0}),
        ("layer_norm", {"eps": 1}),
        ("layer_norm", {"eps": True}),
        ("layer_norm", {"dropout_p": 0.5, "seed": 1}),
        ("rms_norm", {"weight": None}),  # but an offset of 1
        ("bias_act", {"activation": "tanh"}),
        ("softmax", {"causal": 1}),
        ("softmax", {"x": torch.ones(3, 4)}),
        ("softmax", {"mask": torch.ones(3, 3, dtype=torch.bool)}),
        ("cross_entropy", {"target": torch.tensor([2, -1, 3])}),
        ("cross_entropy", {"target": torch.tensor([2, 16, 3])}),
        ("cross_entropy", {"ignore_index": 2}),  # and a target of -100
        ("cross_entropy", {"label_smoothing": 1.5}),
        ("linear_cross_entropy", {"target": torch.tensor([2, -1, 3])}),
        ("linear_cross_entropy", {"target": torch.tensor([2, 17, 3])}),
        ("linear_cross_entropy", {"ignore_index": 2}),  # and a target of -100
        ("linear_cross_entropy", {"z_loss": -0.5}),
        ("linear_cross_entropy", {"weight": torch.ones(17, 15)}),
        ("linear_cross_entropy", {"weight": torch.ones(0, 16)}),
        ("linear_cross_entropy", {"weight": torch.ones(17, 16).half()}),
        ("linear_cross_entropy", {"bias": torch.ones(17).half()}),
        ("attention", {"q": torch.ones(2, 4, 5, 8)}),  # causal, and not square
        ("attention", {"kv_lengths": torch.tensor([1, 4], dtype=torch.int32)}),
        ("attention", {"kv_lengths": torch.tensor([-1, 3], dtype=torch.int32)}),
        ("attention", {"kv_lengths": torch.tensor([1, 3])}),
        ("attention", {"window": (1, 0)}),
        ("attention", {"v": torch.ones(2, 2, 3, 513)}),
        ("attention_varlen", {"cu_seqlens_k": torch.tensor([0, 1, 6], dtype=torch.int32)}),  # causal, and two
        ("attention_varlen", {"cu_seqlens_k": torch.tensor([0, 1, 6])}),
        ("attention_varlen", {"max_k": 4}),
        ("attention_varlen", {"max_q": 2**64}),
        ("attention_varlen", {"max_q": True}),
        ("attention_varlen", {"window": (1, 0)}),
        ("attention_varlen", {"alibi_slopes": torch.ones(4)}),
        ("attention_varlen", {"k": torch.ones(6, 3, 8), "v": torch.ones(6, 3, 8)}),
        ("attention_varlen", {"v": torch.ones(6, 2, 513)}),
        ("decode_attention", {"kv_lengths": torch.tensor([1, 8], dtype=torch.int32)}),
        ("append_kv", {"kv_lengths": torch.tensor([1, 5], dtype=torch.int32)}),
        ("append_kv", {"kv_lengths": torch.tensor([-1, 3], dtype=torch.int32)}),
        ("rope", {"cos": torch.ones(3, 7), "sin": torch.ones(3, 7)}),
        ("rope", {"cos": torch.ones(3, 10), "sin": torch.ones(3, 10)}),
        ("rope", {"cos": torch.ones(3, 8, requires_grad=True)}),
        ("feed_forward", {"x": torch.tensor(1.0)}),
        ("feed_forward", {"x": torch.ones(3, 15)}),
        ("feed_forward", {"w2": torch.ones(5, 9)}),
        ("feed_forward", {"b1": torch.ones(8).half()}),
        ("feed_forward", {"b2": torch.ones(1, 5)}),
        ("feed_forward", {"activation": "tanh"}),
        ("feed_forward", {"dropout_p": 0.5, "seed": 1}),
    ],
)
def test_what_is_not_usual_is_checked(name, changed):
    assert_unusual(name, usual()[name] | changed)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize(
    ("starts", "longest"),
    [
        ([0, 1, 6], 4),
        ([0, 7, 6], 9),
        ([0, -1, 6], 9),
        ([1, 2, 6], 9),
        ([-1, 2, 6], 9),
        ([0, 1, 5], 9),
        ([0, 1, 7], 9),
        ([0, 1, 1, 6], 9),
        ([0, 6], 9),
        ([0], 9),
        ([], 9),
        ([0, 1, 6], -1),
    ],
)
def test_starts_of_sequences_are_looked_at(side, starts, longest):
    arguments = usual()["attention_varlen"] | {"causal": False}
    with watched("attention_varlen") as taken:
        outcome("attention_varlen", arguments)
    assert taken == [True]
    changed = {f"cu_seqlens_{side}": torch.tensor(starts, dtype=torch.int32), f"max_{side}": longest}
    assert_unusual("attention_varlen", arguments | changed)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0,), (), (16,), (2, 0, 16)])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "bias_act", "glu", "dropout_add", "softmax"])
def test_empty_tensors_and_single_numbers_give_the_same_as_before(name, shape):
    arguments = {"glu": {"gate": torch.ones(shape), "up": torch.ones(shape)}}.get(
        name, {"x": torch.ones(shape)}
    )
    assert_same(outcome(name, arguments), checked(name, arguments))


class Function(TorchFunctionMode):
    """Sees every function of torch's that is called."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "use_backend": lambda: fastlm.use_backend("reference"),
    "function_mode": Function,
    "dispatch_mode": KernelCalls,
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mode_makes_a_call_unusual(name, context):
    with CONTEXTS[context]():
        assert_unusual(name, usual()[name])


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_are_checked(name):
    with FakeTensorMode() as mode:
        arguments = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in usual()[name].items()}
        with watched(name) as taken:
            found = getattr(ops, name)(**arguments)
    assert taken == [False]
    real = getattr(ops, name)(**usual()[name])
    assert [t.shape for t in tensors_of(found)] == [t.shape for t in tensors_of(real)]


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
@pytest.mark.parametrize("name", ["layer_norm", "glu", "softmax", "rope", "feed_forward"])
def test_a_functional_transform_makes_a_call_unusual(name, transform):
    """Also of a call that the transform's own tensors do not reach."""
    plain = usual()[name]
    with watched(name) as taken:
        transform(lambda x: x + tensors_of(getattr(ops, name)(**plain))[0].sum())(torch.ones(3))
    assert taken == [False]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_makes_a_call_unusual(name):
    arguments = usual()[name]

    def function(x):
        getattr(ops, name)(**arguments)
        return x + 1

    untraceable = suppress(RuntimeError) if name == "linear_cross_entropy" else nullcontext()
    with watched(name) as taken, untraceable:  # torch.jit has no lists of bools, its `early`
        torch.jit.trace(function, torch.ones(3), check_trace=False)
    assert taken == [False]


@pytest.mark.parametrize("name", NAMES)
def test_the_compiler_traces_the_longer_way(name):
    torch._dynamo.reset()
    arguments, eager = usual()[name], usual()[name]
    eager = copied(arguments)
    wanted = getattr(ops, name)(**eager)
    with watched(name) as taken:
        got = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")(**arguments)
    assert taken == []
    for a, b in zip(tensors_of(got), tensors_of(wanted), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_backend_is_not_asked_of_the_builtin(name):
    with watched(name) as taken:
        got = outcome(name, usual()[name], backend="cpu")
    assert taken == []
    assert got[0] is not NotImplementedError


def test_a_builtin_refuses_any_number_of_arguments_but_its_own():
    for name in NAMES:
        builtin = getattr(_load.USUAL, name)
        assert builtin() is None and builtin(*[torch.ones(3, 16)] * 30) is None


def test_without_python_headers_the_libraries_are_built_and_the_reason_is_known(tmp_path, monkeypatch):
    """They then have the kernels, and no module for Python to import."""
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    toolchain = importlib.import_module("toolchain")
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert toolchain.missing_python_headers() == f"{tmp_path}/Python.h is missing"
    target = tmp_path / f"_cpu_{_load.ISA}.so"
    toolchain.cpu_libraries(Path(torch.__file__).parent, torch.__version__, {_load.ISA: target})
    assert b"PyInit__cpu_" not in target.read_bytes() and b"layer_norm_backward" in target.read_bytes()


WITHOUT = f"""
import sys
sys.modules["fastlm._cpu_{_load.ISA}"] = None
import torch, fastlm
from fastlm import _load, ops
assert _load.USUAL is None
x = torch.ones(2, 8)
print(fastlm.explain("layer_norm", x).chosen, ops.layer_norm(x).sum().item())
"""


def test_without_the_builtins_every_call_takes_the_longer_way():
    run = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    chosen = fastlm.explain("layer_norm", torch.ones(2, 8)).chosen
    assert run.stdout.split() == [chosen, "0.0"], run.stderr
