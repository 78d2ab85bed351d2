"""A failure costs the figures of what failed: the rest is on disk, and a run that ended early goes on."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fastlm.bench import job, plan, registry, results, run
from fastlm.bench.journal import Journal
from fastlm.bench.options import Options
from fastlm.bench.workload import Baseline
from fastlm.cli.app import app
from fastlm.cli.errors import CommandError

ROOT = Path(__file__).parent.parent
OPTIONS = Options(op=["rms_norm", "glu"], dtype=["f32"], rounds=1, memory="off", peaks=False)
RMS, GLU = "rms_norm tinyllama [17,96] f32 both", "glu tinyllama_silu [17,96] f32 both"


@pytest.fixture(autouse=True)
def small_workloads(monkeypatch):
    """Two workloads of the registry, at their smallest size."""
    small = [replace(w, size=w.small) for w in registry.WORKLOADS if w.op in ("rms_norm", "glu")]
    monkeypatch.setattr(registry, "WORKLOADS", small)
    return small


def _broken(monkeypatch, small, *, call=None, given=dict):
    """The first workload's baseline raises, in its call or before."""

    def fail(**_):
        raise RuntimeError("out of registers\nat line 7")

    broken = replace(small[0], baselines={"eager": Baseline(call or fail, given)})
    monkeypatch.setattr(registry, "WORKLOADS", [broken, *small[1:]])


def _bench(file: Path, **changed) -> bool:
    return job.bench(replace(OPTIONS, **changed), job.Outputs(json=file), Console(quiet=True))


def test_a_baseline_that_fails_costs_its_own_figures(tmp_path, monkeypatch, small_workloads):
    _broken(monkeypatch, small_workloads)
    assert _bench(tmp_path / "x.json")  # nothing of fastlm's failed
    found = results.read(tmp_path / "x.json")
    assert found["failures"] == [{"title": RMS, "side": "eager", "reason": "RuntimeError: out of registers"}]
    assert [list(row["sides"]) for row in found["rows"]] == [["fastlm"], ["eager", "fastlm"]]
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]


def test_a_kernel_that_fails_fails_the_command_but_loses_nothing(tmp_path, monkeypatch):
    from fastlm import ops

    def fail(*_, **__):
        raise ValueError("illegal")

    monkeypatch.setattr(ops, "rms_norm", fail)
    options = ["--op", "rms_norm", "--op", "glu", "--dtype", "f32", "--rounds", "1", "--memory", "off"]
    result = CliRunner().invoke(app, ["bench", *options, "--json", str(tmp_path / "x.json")])
    assert result.exit_code == 1
    assert f"Failed: {RMS}, fastlm: ValueError: illegal" in result.stdout
    found = results.read(tmp_path / "x.json")
    assert [list(row["sides"]) for row in found["rows"]] == [["eager"], ["eager", "fastlm"]]


def test_a_job_that_fails_whole_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measured", lambda row, *_: 1 / (row.op != "rms_norm") or {})
    monkeypatch.setattr(plan, "_add", lambda found, options, made: None)
    assert not _bench(tmp_path / "x.json")
    (failure,) = results.read(tmp_path / "x.json")["failures"]
    assert failure == {"title": RMS, "side": None, "reason": "ZeroDivisionError: division by zero"}


def test_no_job_begins_after_the_limit(tmp_path):
    assert _bench(tmp_path / "x.json", limit_s=0.0)
    found = results.read(tmp_path / "x.json")
    assert (found["rows"], found["left_out"]) == ([], [RMS, GLU])


def test_jobs_left_out_are_done_by_a_resumed_run_and_no_others(tmp_path, monkeypatch):
    file, real, calls = tmp_path / "x.json", plan.measured, []

    def slow(row, *rest):
        calls.append(row.op)
        monkeypatch.setattr(run.time, "monotonic", lambda: 1e12)  # the limit is up after the first
        return real(row, *rest)

    with monkeypatch.context() as time_passes:
        time_passes.setattr(plan, "measured", slow)
        time_passes.setattr(run, "time", SimpleNamespace(monotonic=time.monotonic))
        assert _bench(file, limit_s=60.0)
    assert calls == ["rms_norm"] and results.read(file)["left_out"] == [GLU]
    monkeypatch.setattr(plan, "measured", lambda row, *rest: calls.append(row.op) or real(row, *rest))
    with pytest.raises(CommandError, match="x.json was begun with other options"):
        _bench(file, resume=True, rounds=2)
    assert _bench(file, resume=True)
    found = results.read(file)
    assert calls == ["rms_norm", "glu"] and [row["op"] for row in found["rows"]] == calls
    assert "left_out" not in found and [f.name for f in tmp_path.iterdir()] == ["x.json"]
    assert _bench(file, resume=True) and results.read(file) == found and calls == ["rms_norm", "glu"]


def test_results_so_far_are_on_disk_before_each_job(tmp_path, monkeypatch):
    seen = []
    real = plan.measured

    def looked_at(row, *rest):
        seen.append(json.loads((tmp_path / "x.json.part").read_text()))
        return real(row, *rest)

    monkeypatch.setattr(plan, "measured", looked_at)
    assert _bench(tmp_path / "x.json")
    assert [(len(s["rows"]), s["running"], s["done"]) for s in seen] == [(0, RMS, []), (1, GLU, [RMS])]
    found = results.read(tmp_path / "x.json")
    assert found["done"] == [RMS, GLU] and "running" not in found


def test_a_run_goes_on_where_an_earlier_one_ended(tmp_path, monkeypatch):
    real = plan.measured
    file = tmp_path / "x.json"

    def interrupted(row, *rest):
        if row.op == "glu":
            raise KeyboardInterrupt
        return real(row, *rest)

    monkeypatch.setattr(plan, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _bench(file)
    assert [f.name for f in tmp_path.iterdir()] == ["x.json.part"]
    calls = []
    monkeypatch.setattr(plan, "measured", lambda row, *rest: calls.append(row.op) or real(row, *rest))
    with pytest.raises(CommandError, match="was begun with other options"):
        _bench(file, resume=True, rounds=2)
    assert _bench(file, resume=True, limit_s=60.0)
    assert calls == ["glu"]
    found = results.read(file)
    assert [row["op"] for row in found["rows"]] == ["rms_norm", "glu"]
    assert "failures" not in found and [f.name for f in tmp_path.iterdir()] == ["x.json"]


def test_a_job_that_ended_the_process_is_not_begun_again(tmp_path):
    code = (
        "import os, sys; from dataclasses import replace; from pathlib import Path\n"
        "sys.path.insert(0, 'tests'); import test_bench_journal as t\n"
        "from fastlm.bench import plan, registry\n"
        "known = [w for w in registry.WORKLOADS if w.op in t.OPTIONS.op]\n"
        "registry.WORKLOADS[:] = [replace(w, size=w.small) for w in known]\n"
        "plan.measured = lambda *_: os.kill(os.getpid(), 9)\n"
        "t._bench(Path(sys.argv[1]))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "x.json")]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -9
    assert not _bench(tmp_path / "x.json", resume=True)
    found = results.read(tmp_path / "x.json")
    assert found["failures"] == [{"title": RMS, "side": None, "reason": "the process ended in it"}]
    assert [row["op"] for row in found["rows"]] == ["glu"]


def test_a_device_that_is_lost_ends_the_run_and_its_job(tmp_path, monkeypatch):
    from fastlm.bench import trial

    def lost(device, after):
        raise trial.DeviceLost(f"the GPU cannot be used any more after {after}; go on with --resume")

    monkeypatch.setattr(run, "check_device_lives", lost)
    monkeypatch.setattr(plan, "measured", lambda *_: 1 / 0)
    with pytest.raises(CommandError, match="after ZeroDivisionError: division by zero; go on with --resume"):
        _bench(tmp_path / "x.json")
    monkeypatch.undo()
    assert Journal(tmp_path / "x.json").part.exists()


def test_resume_without_a_file_is_refused():
    result = CliRunner().invoke(app, ["bench", "--resume"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("fastlm bench: --resume needs --json")
