"""What `fastlm bench` compares does the same work, and the work is counted right."""

from dataclasses import replace

import pytest
import torch

from fastlm.bench import growth, models, peaks, sweep
from fastlm.bench.registry import WORKLOADS
from fastlm.bench.sides import sides
from fastlm.bench.workload import Workload
from fastlm.testing.compare import KernelCalls, judge


def _small(workload: Workload) -> Workload:
    options = workload.options | ({"dropout_p": 0.0} if "dropout_p" in workload.options else {})
    return replace(workload, size=workload.small, sets=3, options=options)


def _draws(step) -> list[torch.Tensor]:
    """Outputs and gradients of three sets of inputs, each stacked."""
    return [torch.stack(tensors) for tensors in zip(*(step() for _ in range(3)), strict=True)]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: f"{w.op}-{w.name}")
def test_baseline_and_fastlm_do_the_same_work(workload):
    small, direction = _small(workload), workload.directions[-1]
    for name, baseline in small.baselines.items():
        ref = _draws(sides(small, "f64", direction, "cpu", [name], [])[name])
        low = _draws(sides(small, "f32", direction, "cpu", [name], [])[name])
        with KernelCalls() as calls:
            got = _draws(sides(small, "f32", direction, "cpu", [], ["cpu"])["fastlm.cpu"])
        assert any(call.startswith(workload.op) for call in calls.names)
        given = [small.arguments("f32", seed=seed) for seed in range(3)]
        for i, (g, lo, r) in enumerate(zip(got, low, ref, strict=True)):
            lo, r = (torch.stack([*map(baseline.unform, given, ts)]) for ts in (lo, r))
            verdict = judge(f"{'gradient' if i else 'output'} {i}", g, lo, r)
            assert verdict.ratio <= 1, str(verdict)


@pytest.mark.parametrize(
    "workload", [w for w in WORKLOADS if w.options.get("dropout_p")], ids=lambda w: f"{w.op}-{w.name}"
)
def test_baselines_of_dropout_workloads_drop(workload):
    made = sides(replace(workload, size=workload.small), "f32", "both", "cpu", ["eager", "sdpa"], [None])
    for step in made.values():
        assert not torch.equal(step()[0], step()[0])


def _named(op: str, name: str) -> Workload:
    return next(w for w in WORKLOADS if (w.op, w.name) == (op, name))


def test_work_is_what_one_counts_by_hand():
    norm = _named("layer_norm", "gpt2")
    arguments = replace(norm, size=(10, 30)).arguments("bf16")
    assert norm.work(arguments, "forward").bytes == 2 * 10 * 30 * 2  # x, y
    assert norm.work(arguments, "both").bytes == 5 * 10 * 30 * 2  # and x, dy, dx
    causal = _named("attention", "gpt2_causal")
    arguments = replace(causal, size=(1, 2, 4, 8)).arguments("f32")
    assert causal.work(arguments, "forward").flops == 2 * (1 + 2 + 3 + 4) * (2 * 8 + 2 * 8)
    assert causal.work(arguments, "both").flops == 3.5 * 640
    assert causal.work(arguments, "forward").bytes == 4 * (1 * 2 * 4 * 8) * 4  # q, k, v, out
    lengths = _named("attention", "half_lengths")
    arguments = replace(lengths, size=(3, 2, 6, 8)).arguments("f32")
    assert lengths.work(arguments, "forward").flops == 3 * 2 * 6 * 3 * (2 * 8 + 2 * 8)


def test_a_step_of_gpt_counts_its_matmuls_and_its_optimizer():
    tiny = models.Gpt("tiny", layers=1, dim=8, heads=2, vocab=50, batch=2, context=5)
    layer, head, scores = 12 * 8 * 8, 8 * 50, (1 + 2 + 3 + 4 + 5) * 8
    counted = models.work(tiny, parameters=1000)
    assert counted.flops == 6 * 10 * (layer + head) + 3.5 * 2 * 2 * 2 * scores
    assert (counted.bytes, counted.adds_up) == (28000, True)


def test_sweep_has_sizes_for_every_op_and_measures_one():
    points = sweep.points([], quick=False)
    assert {w.op for w, _, _ in points} == {w.op for w in WORKLOADS}
    found = sweep.measured(*sweep.points(["layer_norm"], quick=True)[0], "cpu", ["eager"], rounds=2)
    assert (found["size"], found["best_baseline"], found["runs_on"]) == ([1, 64], "eager", "cpu")
    assert len(found["sides"]["fastlm"]["rounds_s"]) in (2, 6)


def test_threads_are_as_before_after_they_were_varied():
    before = torch.get_num_threads()
    found = growth.threads(_small(_named("layer_norm", "gpt2")), rounds=2)
    assert (torch.get_num_threads(), found["threads"]) == (before, before)
    assert [w.op for w in growth.one_per_op()] == list(dict.fromkeys(w.op for w in WORKLOADS))


def test_peak_memory_is_what_one_counts_by_hand():
    workload = replace(_named("layer_norm", "gpt2"), size=(4096, 1024))
    tensor_mb = 4096 * 1024 * 4 / 1e6
    found = peaks.peak_mb(workload, "fastlm", "f32", "cpu")  # y; dx is a returned gradient
    assert found == pytest.approx(tensor_mb, rel=0.2)


TINY = {"layers": 1, "dim": 16, "heads": 2, "vocab": 300, "batch": 2, "context": 8}


def test_the_steps_of_a_gpt_have_one_loss():
    steps = models.row(models.Gpt("tiny", **TINY), "cpu", ["eager"], [None, "cpu"]).steps
    losses = {side: [step()[0].item() for _ in range(2)] for side, step in steps.items()}
    assert set(losses) == {"eager", "fastlm", "fastlm.cpu"}
    for values in losses.values():
        torch.testing.assert_close(values, losses["eager"])
        assert values[0] == values[1]  # each step is the same work


def test_a_confident_model_has_denormal_gradients():
    shares = {}
    for gpt in models.STRESS:
        tokens, targets = gpt.batch_of("cpu")
        logits = gpt.model("cpu")(tokens).detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        (gradient,) = torch.autograd.grad(loss, logits)
        tiny = torch.finfo(torch.float32).tiny
        shares[gpt.name] = ((gradient != 0) & (gradient.abs() < tiny)).float().mean().item()
    assert shares["fresh"] == 0.0 and shares["confident"] > 0.1


def test_stress_rows_are_of_both_models(monkeypatch):
    tiny = [replace(gpt, **TINY) for gpt in models.STRESS]
    monkeypatch.setattr(models, "STRESS", tiny)
    found = models.stress_rows("cpu", ["eager", "compile"], [None], rounds=1)
    assert [(row["workload"], list(row["sides"])) for row in found] == [
        ("fresh", ["eager", "fastlm"]),
        ("confident", ["eager", "fastlm"]),
    ]
