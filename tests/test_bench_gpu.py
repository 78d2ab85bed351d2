"""What `fastlm bench` does on a GPU, as far as a machine without one can show it."""

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from fastlm import ops
from fastlm.bench import clock, machine, models, options, peers, plan, plots, report, results, sides
from fastlm.bench.registry import WORKLOADS
from fastlm.cli.app import app
from fastlm.testing.compare import judge
from fastlm.tune import search

ATTENTION = {"sdpa", "flex", "sdpa_flash", "flash_attn", "fastlm"}
ROWWISE = {"eager", "compile", "fastlm"}
SIDES = {
    "attention gpt2_causal": ATTENTION,
    "attention long_causal": ATTENTION,
    "attention causal_dropout": ATTENTION - {"flex"},
    "attention half_lengths": {"sdpa", "flex", "fastlm"},
    "attention_varlen 16_to_256_tokens": ATTENTION - {"sdpa_flash"},
    "decode_attention cached": ATTENTION,
    "rope tinyllama": ROWWISE | {"flash_attn"},
    "layer_norm gpt2": ROWWISE | {"liger"},
    "rms_norm tinyllama": ROWWISE | {"liger"},
    "glu tinyllama_silu": ROWWISE | {"liger"},
    "cross_entropy small_vocabulary": ROWWISE | {"liger"},
    "linear_cross_entropy gpt2": ROWWISE | {"liger"},
}


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: f"{w.op}-{w.name}")
def test_sides_of_every_workload_on_a_gpu(workload):
    made = sides.calls(workload, options.BASELINES, [None])
    assert set(made) == SIDES.get(f"{workload.op} {workload.name}", ROWWISE)
    assert list(made)[-1] == "fastlm"
    assert set(peers.of(workload.op, workload.name)) <= set(peers.PEERS)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: f"{w.op}-{w.name}")
def test_workloads_on_a_gpu_are_larger_and_in_bfloat16(workload):
    on = workload.on("cuda")
    assert on.dtypes == ("bf16",) and len(on.size) == len(workload.size)
    assert on.gpu or on.name == "one_row"
    assert workload.on("cpu") is workload
    arguments = search.fake_arguments(on, "bf16", FakeTensorMode())  # the sizes fit together
    moved = sum(t.numel() * t.element_size() for t in arguments.values() if isinstance(t, torch.Tensor))
    assert on.name == "one_row" or 50e6 < moved < 3e9


def test_models_on_a_gpu():
    gpt2, stress = models.MODELS[0], models.STRESS[0]
    assert gpt2.on("cpu") is gpt2
    assert (gpt2.on("cuda:0").dtype, gpt2.on("cuda:0").name) == ("bf16", "gpt2")
    assert stress.on("cuda") is stress  # its gradients are denormal in float32 only
    tiny = replace(gpt2.on("cuda"), layers=1, dim=16, heads=2, vocab=300, batch=2, context=8)
    row = models.row(tiny, "cpu", ["eager"], [None])
    losses = {name: step()[0] for name, step in row.steps.items()}
    assert row.dtype == "bf16" and {loss.dtype for loss in losses.values()} == {torch.bfloat16}
    torch.testing.assert_close(losses["eager"], losses["fastlm"])


class _Event:
    def __init__(self, cuda):
        self._cuda, self.at = cuda, None

    def record(self):
        self.at = self._cuda.now

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class _Cuda:
    """A device whose time passes in steps and waits only, and which notes what it was told."""

    def __init__(self):
        self.now, self.told = 0.0, []

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=1000)

    def Event(self, enable_timing):
        assert enable_timing
        return _Event(self)

    def synchronize(self):
        self.told.append("synchronize")

    def _sleep(self, cycles):
        self.told.append("wait")
        self.now += cycles / 2e9

    def step(self):
        self.told.append("step")
        self.now += 0.25


def test_clock_of_a_gpu_counts_the_call_alone():
    cuda = _Cuda()
    found = clock.CudaClock("cpu", cuda)
    assert found.host_s(cuda.step) < 0.1  # what the host needed, not what the device did
    cuda.told.clear()
    assert found.seconds(cuda.step, 3) == pytest.approx(0.25)
    assert cuda.told == ["wait", "step"] * 3 + ["synchronize"]
    assert found._flush.numel() == 2000  # twice the second-level cache
    times = clock.interleaved({"a": cuda.step}, 2, found)
    assert times == {"a": [pytest.approx(0.25)] * 2}


def test_a_machine_without_a_gpu_refuses_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("fastlm bench: --device cuda needs a GPU: torch ")
    assert result.stderr.count("\n") == 1
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    result = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert "(CUDA 13.0) finds no GPU or no driver here" in result.stderr


def test_baselines_by_default_are_those_that_are_installed(monkeypatch):
    assert options.default_baselines("cpu") == ["eager", "sdpa"]
    installed = {"flash_attn"}
    monkeypatch.setattr(peers, "find_spec", lambda name: name if name in installed else None)
    assert options.default_baselines("cuda:0") == [*options.TORCH, "flex", "sdpa_flash", "flash_attn"]
    assert peers.missing("liger") == "needs liger_kernel: pip install liger-kernel"


def _flash_attn():
    """A stand-in with flash-attn's signatures and layouts, computed by SDPA."""

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal).transpose(1, 2)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        lengths = cu_seqlens_q.diff().tolist()
        parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
        return torch.cat([dense(*(t[None] for t in part))[0] for part in parts])

    def cached(q, k_cache, v_cache, *, cache_seqlens, causal):
        assert causal and (cache_seqlens == k_cache.shape[1]).all()
        return dense(q, k_cache, v_cache)

    def rotary(x, cos, sin):
        cos, sin = (t[:, None] for t in (cos, sin))
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = dense, varlen
    package.flash_attn_with_kvcache = cached
    layers = types.ModuleType("flash_attn.layers.rotary")
    layers.apply_rotary_emb = rotary
    return {"flash_attn": package, "flash_attn.layers": package, "flash_attn.layers.rotary": layers}


def _liger():
    """A stand-in with Liger-Kernel's signatures; its losses overwrite their logits, as the real ones do."""

    def cross_entropy(logits, target):
        loss = F.cross_entropy(logits.clone(), target)
        logits.detach().zero_()
        return loss

    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_cross_entropy = cross_entropy
    functional.liger_layer_norm = lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps)
    functional.liger_rms_norm = lambda x, w, eps, in_place: F.rms_norm(x, x.shape[-1:], w, eps)
    functional.liger_swiglu = lambda a, b: F.silu(a) * b
    functional.liger_fused_linear_cross_entropy = lambda x, w, t: F.cross_entropy(F.linear(x, w), t)
    package = types.ModuleType("liger_kernel.transformers")
    package.functional = functional
    outer = types.ModuleType("liger_kernel")
    outer.transformers = package
    return {"liger_kernel": outer, package.__name__: package, functional.__name__: functional}


POINTS = [(w, peer) for w in WORKLOADS for peer in peers.of(w.op, w.name)]


@pytest.mark.parametrize(("workload", "peer"), POINTS, ids=lambda p: getattr(p, "title", p))
def test_peers_get_their_inputs_as_they_want_them(workload, peer, monkeypatch):
    for name, module in (_flash_attn() | _liger()).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # FlexAttention computes uncompiled too
    chosen = {n: 0.0 if n == "dropout_p" else v for n, v in workload.options.items()}
    small = replace(workload, size=workload.small, sets=1, options=chosen)
    way = "forward" if peer == "flex" else workload.directions[-1]  # it has no backward on a CPU
    found = {}
    for side, dtype in ((peer, "f32"), ("fastlm", "f32"), ("fastlm", "f64")):
        wanted = ([], [None]) if side == "fastlm" else ([side], [])
        step, form = sides.builders(small, dtype, way, "cpu", *wanted)[side]()
        with torch.inference_mode(way == "forward"):
            output, *gradients = step()
        found[side, dtype] = [form(output.detach())] + gradients
    unformed = peers.of(workload.op, workload.name)[peer]().unform
    arguments = small.arguments("f32")
    for i, (got, low, ref) in enumerate(
        zip(found[peer, "f32"], found["fastlm", "f32"], found["fastlm", "f64"], strict=True)
    ):
        got = unformed(arguments, got) if i and got.shape != ref.shape else got
        assert judge(f"{peer} {i}", got, low, ref).ratio <= 4  # another order of sums than either


def test_what_computes_something_else_is_told():
    from fastlm.bench.trial import unlike

    ours = torch.tensor([1.0, -2.0])
    outputs = {"sdpa": ours + 0.01, "flex": ours * 2, "liger": ours[None], "fastlm": ours}
    found = unlike(outputs | {"flash_attn": torch.tensor([float("nan"), -2.0])})
    assert set(found) == {"flex", "liger", "flash_attn"}
    assert found["flex"] == "computes something else: off by 2, where the largest is 2"
    assert unlike({"sdpa": ours}) == {}


def _gpu_facts() -> dict:
    gpu = {"name": "NVIDIA A100", "capability": "8.0", "multiprocessors": 108, "memory_mb": 40000}
    packages = {"triton": "3.8.0", "flash-attn": None, "liger-kernel": None}
    facts = {"device": "nvidia-a100", "cpu": "A processor", "instruction_set": "avx2", "threads": 2}
    facts |= {"torch": "2.13.0", "fastlm": "0.1.0", "date": "2026-01-02T03:04:05+00:00", "cuda": "13.0"}
    return facts | {"gpu": gpu, "packages": packages}


def test_a_gpus_table_and_pictures_have_its_peers(tmp_path):
    from fastlm.bench import docs, measure
    from fastlm.bench.workload import Work

    made = measure.Row("attention", "gpt2_causal", (1, 2, 4, 8), "bf16", "both", {}, Work(16.0, 64.0))
    times = {"sdpa": [2.0] * 3, "flex": [3.0] * 3, "flash_attn": [1.5] * 3, "fastlm": [1.0] * 3}
    row = measure.row_of(made, times, {"copy": 32.0, "read": 40.0, "mm": 1e4}) | {"memory": "gpu"}
    plain = measure.row_of(
        replace(made, op="glu"), {"eager": [2.0] * 3, "fastlm": [1.0] * 3}, row["ceilings"]
    )
    found = results.empty(_gpu_facts(), {}) | {"rows": [row, plain | {"memory": "gpu"}]}
    assert report.columns(found["rows"])[4:7] == ["compile", "flex", "flash_attn"]
    (line,) = report.cells(row, report.peers_in(found["rows"]))
    assert line[3:7] == ["2.00", "–", "3.00", "1.50*"]
    assert [f.name for f in plots.write(tmp_path, found)] == [
        "bench_ratios.png",
        "bench_peers.png",
        "bench_roofline.png",
    ]
    page = docs.markdown(found, "x.json")
    assert "NVIDIA A100, CUDA 13.0, triton 3.8.0, torch 2.13.0, fastlm 0.1.0;" in page
    assert "**On the GPU**" in page and "| flex | flash_attn |" in page
    assert report.table(found["rows"], "gpu").row_count == 2


def test_results_of_a_gpu_are_named_after_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert machine.device_name("cuda") == "nvidia-h100-80gb-hbm3"


def test_every_op_comes_first_where_time_is_short():
    jobs = [(title, None) for title in ("a 1", "a 2", "a 3", "b 1", "c 1", "c 2")]
    assert [t for t, _ in plan.every_op_first(jobs)] == ["a 1", "b 1", "c 1", "a 2", "c 2", "a 3"]


def test_no_op_is_without_a_public_function():
    assert all(hasattr(ops, w.op) for w in WORKLOADS)
