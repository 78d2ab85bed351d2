"""Dispatch chooses, refuses with a reason, and never falls back in silence."""

import threading

import pytest
import torch
from fake_cuda import first_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm import _load, ops
from fastlm._op import BACKENDS, OPS
from fastlm.testing.compare import KernelCalls


@pytest.mark.parametrize("name", OPS)
def test_the_cpu_kernel_is_chosen_for_cpu_tensors(name):
    with KernelCalls() as calls:
        getattr(ops, name)(**first_inputs(name))
    assert f"{name}.cpu" in calls.names
    assert fastlm.explain(name, **first_inputs(name)).chosen == "cpu"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_explicit_backend_never_falls_back(name, backend):
    reason = fastlm.explain(name, **first_inputs(name)).reasons[backend]
    assert reason
    with pytest.raises(NotImplementedError) as error:
        getattr(ops, name)(**first_inputs(name), backend=backend)
    assert str(error.value) == reason


@pytest.mark.parametrize("name", OPS)
def test_float64_runs_on_the_reference_and_says_why(name):
    inputs = first_inputs(name, dtype=torch.float64)
    explained = fastlm.explain(name, **inputs)
    assert explained.chosen == "reference"
    assert "torch.float64" in explained.reasons["cpu"]
    with KernelCalls() as calls:
        getattr(ops, name)(**inputs)
    assert calls.names == []


@pytest.mark.parametrize("name", OPS)
def test_use_backend_reaches_every_op_inside_it(name):
    with fastlm.use_backend("reference"), KernelCalls() as calls:
        getattr(ops, name)(**first_inputs(name))
    assert calls.names == []
    with fastlm.use_backend("cuda"), pytest.raises(NotImplementedError):
        getattr(ops, name)(**first_inputs(name))
    with KernelCalls() as calls:
        getattr(ops, name)(**first_inputs(name))
    assert f"{name}.cpu" in calls.names


def test_an_argument_wins_over_use_backend():
    with fastlm.use_backend("cuda"), KernelCalls() as calls:
        ops.layer_norm(torch.randn(2, 8), backend="cpu")
    assert calls.names == ["layer_norm.cpu"]


def test_use_backend_is_of_its_own_thread():
    found = []
    with fastlm.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(fastlm.explain("layer_norm", torch.ones(2, 8))))
        thread.start()
        thread.join()
    assert found[0].chosen == "cpu"


def test_use_backend_is_restored_after_an_error():
    with pytest.raises(RuntimeError), fastlm.use_backend("reference"):
        raise RuntimeError
    assert fastlm.explain("layer_norm", torch.ones(2, 8)).chosen == "cpu"


@pytest.mark.parametrize("call", [lambda: ops.layer_norm(torch.ones(2, 8), backend="metal"), "with"])
def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(call):
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, reference"):
        if call == "with":
            with fastlm.use_backend("metal"):
                pass
        else:
            call()


def test_explain_names_every_backend_and_draws_no_random_number():
    state = torch.get_rng_state()
    explained = fastlm.explain("layer_norm", torch.ones(2, 8), dropout_p=0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert tuple(explained.reasons) == BACKENDS
    assert all(f"{b}: " in str(explained) for b in BACKENDS)


def test_explain_takes_the_public_function_too():
    assert fastlm.explain(ops.layer_norm, torch.ones(2, 8)).chosen == "cpu"


def test_explain_of_an_unknown_op_lists_the_known_ones():
    with pytest.raises(ValueError, match="op must be one of .*layer_norm.*, got 'norm'"):
        fastlm.explain("norm", torch.ones(2))


def test_other_devices_run_on_the_reference_with_the_reason():
    x = torch.empty(2, 8, device="meta")
    explained = fastlm.explain("layer_norm", x)
    assert explained.chosen == "reference"
    assert explained.reasons["cpu"] == "layer_norm.cpu takes cpu tensors, x is on meta"
    assert ops.layer_norm(x).device.type == "meta"


def _fake_attention(queries, dtype, dropout_p=0.0):
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 4, queries, 64, dtype=dtype, device="cuda") for _ in range(3))
        return fastlm.explain("attention", q, k, v, causal=True).chosen


def test_triton_comes_first_where_it_was_measured_to_be_faster(monkeypatch):
    """2 * (64 + 64) * 2 * 4 * queries^2 is 2e10 at 3125 queries."""
    monkeypatch.setitem(_load.MISSING, "cuda", None)
    assert _fake_attention(3124, torch.bfloat16) == "cuda"
    assert _fake_attention(3126, torch.bfloat16) == "triton"
    assert _fake_attention(3126, torch.float32) == "cuda"
    monkeypatch.setitem(_load.MISSING, "cuda", "not built")
    assert _fake_attention(3124, torch.bfloat16) == "triton"
    monkeypatch.setitem(_load.MISSING, "cuda", None)
    monkeypatch.setitem(_load.MISSING, "triton", "not installed")
    assert _fake_attention(3126, torch.bfloat16) == "cuda"


def test_packed_attention_counts_every_token_with_the_longest_sequence(monkeypatch):
    monkeypatch.setitem(_load.MISSING, "cuda", None)

    def chosen(longest):
        with FakeTensorMode():
            q = torch.empty(10_000, 4, 64, dtype=torch.float16, device="cuda")
            starts = torch.empty(6, dtype=torch.int32, device="cuda")
            return fastlm.explain("attention_varlen", q, q, q, starts, starts, longest, longest).chosen

    assert chosen(1952) == "cuda" and chosen(1954) == "triton"
