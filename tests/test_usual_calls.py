"""A usual call runs wholly in C++ and computes what the checked way computes."""

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from usual_calls import NAMES, SEEDED, assert_same, checked, outcome, same, usual, watched

from fastlm import _load
from fastlm._op import OPS
from fastlm.testing.cases import Draw, cases_of


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


@pytest.mark.parametrize("seed", [None, 7, -(2**63), torch.tensor([2**40 + 1])])
@pytest.mark.parametrize("name", SEEDED)
def test_dropout_is_usual_and_draws_what_the_checked_way_draws(name, seed):
    arguments = usual()[name] | {"dropout_p": 0.25, "seed": seed}
    torch.manual_seed(3)
    with watched(name) as taken:
        got = outcome(name, arguments)
    state = torch.get_rng_state()
    assert taken == [True]
    torch.manual_seed(3)
    assert_same(got, checked(name, arguments))
    assert torch.equal(state, torch.get_rng_state())


def drawn(call) -> Tensor:
    """The state of the random numbers after a call of `call`, from a known one on."""
    torch.manual_seed(3)
    call()
    return torch.get_rng_state()


@pytest.mark.parametrize("name", SEEDED)
def test_only_a_call_that_runs_draws_a_seed(name):
    arguments = usual()[name]
    assert torch.equal(drawn(lambda: outcome(name, arguments)), drawn(lambda: None))
    late = {"return_lse": 1} if "attention" in name else {"dropout_p": 0.5, "seed": torch.tensor(7)}
    unusual = arguments | {"dropout_p": 0.25} | late
    with watched(name) as taken:
        state = drawn(lambda: outcome(name, unusual))
    assert taken == [False]
    assert torch.equal(state, drawn(lambda: checked(name, unusual)))
