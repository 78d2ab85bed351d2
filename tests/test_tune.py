"""fastlm tune: what it tries, that the fastest right one wins, and that nothing is tuned unasked."""

import inspect
import math
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastlm_triton import _config
from fastlm_triton._config import Config, config_for
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import fastlm
from fastlm import _tuned
from fastlm._op import OPS
from fastlm.bench import registry
from fastlm.cli.app import app
from fastlm.cli.errors import CommandError
from fastlm.testing import ptxsim
from fastlm.tune import job, search

KERNELS = Path(_config.__file__).parent
BASE = Config((4, 64), 4, 2)


@pytest.fixture(autouse=True)
def nothing_tuned(tmp_path, monkeypatch):
    """No test reads or writes what the user has tuned, nor leaves anything in the kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_config, "TUNED", {})


def a_config(arch: int, cols: int) -> Config:
    """The default of the stand-in kernel."""
    return BASE


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for a kernel: adds 1 to what its block covers, and refuses some configurations."""
    module = SimpleNamespace(a_config=a_config)
    monkeypatch.setitem(sys.modules, "fastlm_triton.stand_in", module)
    monkeypatch.setattr(_config, "arch_of", lambda device: 80)
    x = torch.arange(64.0)

    def call():
        config = config_for(a_config, x.device, 64)
        if config.warps == 16:
            raise RuntimeError("out of registers")
        y = torch.empty_like(x)
        covered = min(config.block[1], 64)
        y[:covered] = x[:covered] + 1
        return (y,)

    return search.Body("stand_in", "forward", call)


KEY = ("a_config", 80, 64)


class _Clock:
    """Seconds that depend on the configuration which is set; notes which were timed."""

    sample_s, most_calls = 0.001, 10

    def __init__(self, seconds):
        self._seconds, self.timed = seconds, []

    def seconds(self, step, calls):
        seen = []

        class Watched(dict):
            def get(self, key, default=None):
                seen.append(super().get(key, default))
                return seen[-1]

        held, _config.TUNED = _config.TUNED, Watched(_config.TUNED)
        try:
            step()
        finally:
            _config.TUNED = held
        self.timed.append(seen[0])
        return self._seconds(seen[0] or BASE)


def _search(kernel, seconds):
    clock = _Clock(seconds)
    return search.search(kernel, KEY, clock, 3, "cpu", lambda line: None), clock


def test_neighbours_are_few_near_and_sensible():
    found = search.neighbours(BASE)
    assert len(found) == len(set(found)) == 10
    assert {c.block for c in found} == {(2, 64), (8, 64), (4, 32), (4, 128), (2, 128), (8, 32), (4, 64)}
    assert {c.warps for c in found} == {2, 4, 8} and {c.stages for c in found} == {1, 2, 3}
    least = search.neighbours(Config((1,), 1, 1))
    assert least == [Config((2,), 1, 1), Config((1,), 2, 1), Config((1,), 1, 2)]
    assert all(math.prod(c.block) <= 4 * 256 for c in found)


def test_the_keys_of_a_body_are_what_it_asks_for(kernel):
    assert search.keys_of(kernel) == [KEY]
    assert search.default_of(KEY) == BASE
    with pytest.raises(LookupError, match="no module of fastlm_triton has b_config"):
        search.default_of(("b_config", 80))


def test_the_search_goes_on_from_the_fastest(kernel):
    found, _ = _search(kernel, lambda c: 1.0 / (c.block[0] * c.warps))
    assert found.best == Config((32, 64), 4, 2)  # doubled at each of three steps
    assert found.times_as_fast == pytest.approx(8.0)
    assert _config.TUNED == {}  # the search itself leaves nothing


def test_a_gain_within_the_noise_changes_nothing(kernel):
    found, _ = _search(kernel, lambda c: 1.0 if c == BASE else 0.98)
    assert (found.best, found.times_as_fast) == (BASE, 1.0)


def test_a_candidate_with_other_results_never_wins(kernel):
    found, clock = _search(kernel, lambda c: 1.0 if c.block[1] >= 64 else 0.1)
    wrong = Config((4, 32), 4, 2)
    assert "output 0 has NaN or infinity in other places" in found.rejected[wrong]
    assert found.best == BASE and all(c is None or c.block[1] >= 64 for c in clock.timed)


def test_a_candidate_that_raises_never_wins(kernel):
    found, _ = _search(kernel, lambda c: 1.0 / c.warps)
    assert found.best.warps == 8
    refused = {c.warps: reason for c, reason in found.rejected.items() if c.block == (4, 64)}
    assert refused == {16: "RuntimeError: out of registers"}


def test_results_differ_beyond_roundings_only():
    half = torch.tensor([1.0, -4.0], dtype=torch.bfloat16)
    assert search.differs((half,), (half,)) is None
    assert search.differs((half * 1.0078125,), (half,)) is None
    assert "off by 0.25" in search.differs((half + 0.25,), (half,))
    small = torch.tensor([1e-7, 1e-9])
    assert "off by" in search.differs((small * 1.1,), (small,))  # small gradients are not waved through
    assert search.differs((torch.tensor([float("nan")]),), (torch.tensor([float("nan")]),)) is None
    assert search.differs((torch.tensor([1]),), (torch.tensor([2]),)) == "output 0 differs"
    assert "has shape" in search.differs((small[:1],), (small,))


def _modules():
    names = [f.stem for f in KERNELS.glob("*.py") if f.stem not in ("__init__", "_config")]
    return [import_module(f"fastlm_triton.{name}") for name in names]


def _own_configs(module):
    return [
        f
        for _, f in inspect.getmembers(module, inspect.isfunction)
        if f.__module__ == module.__name__ and inspect.signature(f).return_annotation is Config
    ]


def test_no_two_kernels_have_config_functions_of_one_name():
    names = [f.__name__ for module in _modules() for f in _own_configs(module) if f.__name__[0] != "_"]
    assert len(names) == len(set(names)) > 0, sorted(names)


TRITON = [w for w in registry.WORKLOADS if "triton" in OPS[w.op].backends]


@pytest.mark.parametrize("workload", TRITON, ids=lambda w: f"{w.op}-{w.name}")
def test_every_kernel_asks_for_keys_that_can_be_tuned_and_kept(workload):
    on, mode = workload.on("cuda"), FakeTensorMode(allow_non_fake_inputs=True)
    arguments, found = search.fake_arguments(on, "bf16", mode), {}
    with search.without_launches(90), mode:
        for body in search.bodies(on, arguments):
            for key in search.keys_of(body):
                found[key] = search.default_of(key)
    assert found and all(search.neighbours(default) for default in found.values())
    _tuned.merge("a GPU", found)
    assert _tuned.read("a GPU") == (found, None)


def _options(**changed) -> job.Options:
    asked = {"op": ["layer_norm"], "workload": "gpt2", "dtype": ["f32"], "size": (9, 96), "device": "cpu"}
    return job.Options(**(asked | {"rounds": 1} | changed))


def test_what_was_found_is_kept_and_serves_later_calls(capsys, monkeypatch):
    """End to end on the simulator: fewer warps are said to be faster."""
    monkeypatch.setattr(search, "_STEPS", 1)
    monkeypatch.setattr(search, "neighbours", lambda c: [c._replace(warps=c.warps // 2)] * (c.warps > 1))
    with ptxsim.device("sm_80"):
        assert job.run(_options(), Console(width=200), _Clock(lambda c: float(c.warps)))
        found, reason = _tuned.read("simulated sm_80")
        assert reason is None and {key[0] for key in found} >= {"norm_forward_config"}
        assert all(c.warps == search.default_of(key).warps // 2 for key, c in found.items())
        told = capsys.readouterr().out
        assert "norm_forward_config(80, 96)" in told and "Kept in " in told and " times as fast" in told
        _config.TUNED.update(found)
        x = torch.randn(9, 96)
        torch.testing.assert_close(
            fastlm.ops.layer_norm(x, backend="triton"), fastlm.ops.layer_norm(x, backend="reference")
        )
        assert job.run(_options(), Console(quiet=True), _Clock(lambda c: 1.0))
        assert _tuned.read("simulated sm_80") == ({}, None)  # nothing is faster now: the old ones go


def test_no_search_begins_after_the_limit(capsys):
    with ptxsim.device("sm_80"):
        assert not job.run(_options(limit_s=0.0), Console(), _Clock(lambda c: 1.0))
    assert "Left out for want of time: layer_norm gpt2 [9,96] f32" in capsys.readouterr().out
    assert not _tuned.folder().exists()


def test_nothing_is_tuned_by_a_call():
    with ptxsim.device("sm_80"):
        fastlm.ops.layer_norm(torch.randn(3, 40), backend="triton")
    assert _config.TUNED == {} and not _tuned.folder().exists()


def test_findings_that_cannot_be_written_are_one_line(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_tuned, "merge", full)
    with (
        ptxsim.device("sm_80"),
        pytest.raises(CommandError, match="cannot write .*: No space left on device"),
    ):
        job.run(_options(), Console(quiet=True), _Clock(lambda c: 1.0))


def test_dry_run_lists_candidates_and_compiles_nothing(monkeypatch):
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("a kernel was started"))
    result = CliRunner().invoke(
        app, ["tune", "--dry-run", "--arch", "90", "--op", "layer_norm", "-k", "gpt2"]
    )
    assert result.exit_code == 0, result.output
    told = result.stdout.splitlines()
    assert told[0] == "layer_norm gpt2 [16384,4096] bf16, forward: norm_forward_config(90, 4096)"
    assert told[1].endswith(" (default)") and len(told) > 10
    assert not _tuned.folder().exists()


def test_dry_run_needs_no_gpu_in_a_process_of_its_own():
    options = ["tune", "--dry-run", "--arch", "90", "--op", "linear_cross_entropy", "--op", "softmax"]
    command = [sys.executable, "-c", "from fastlm.cli import main; main()", *options]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for op in ("linear_cross_entropy", "softmax"):
        assert re.search(rf"(?m)^{op} .*, forward: \w+_config", ended.stdout), ended.stdout


def test_forget_removes_what_was_tuned(capsys):
    with ptxsim.device("sm_80"):
        file = _tuned.merge("simulated sm_80", {KEY: BASE})
        assert job.run(_options(forget=True), Console(width=200))
        assert not file.exists() and "Removed" in capsys.readouterr().out
        assert job.run(_options(forget=True), Console(width=200))
        assert "Nothing was tuned for simulated sm_80" in capsys.readouterr().out


ERRORS = {
    "no GPU": ([], "tuning needs a GPU: torch "),
    "another device": (["--device", "cpu"], "--device must be a GPU, got cpu"),
    "unknown op": (["--op", "sofmax"], "--op must be one of "),
    "unknown dtype": (["--dtype", "int8"], "--dtype must be one of f32, bf16, f16, f64, got int8"),
    "unknown arch": (["--dry-run", "--arch", "70"], "--arch must be one of 80, 90, 100, 120, got 70"),
    "a list without a GPU": (["--dry-run"], "--dry-run needs a GPU, or --arch"),
    "nothing chosen": (["-k", "no such"], "no workload with a Triton kernel was chosen"),
    "a size in words": (["--size", "large"], "--size must be numbers with commas between, got large"),
    "another size": (["--op", "layer_norm", "--size", "3"], "--size must have 2 numbers for layer_norm"),
    "no rounds": (["--rounds", "0"], "--rounds must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, said = ERRORS[name]
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"fastlm tune: {said}")
    assert result.stderr.count("\n") == 1


def test_without_triton_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("fastlm._triton.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["tune"])
    assert result.stderr == "fastlm tune: Triton is not installed: pip install triton\n"
