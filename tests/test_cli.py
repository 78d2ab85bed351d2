"""The commands: what doctor says, and that a failure of demo is one line and leaves nothing behind."""

import errno
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fastlm
from fastlm import _load
from fastlm._op import OPS
from fastlm.cli import demo, demo_files, doctor
from fastlm.cli.app import app
from fastlm.testing.compare import Verdict

ROOT = Path(__file__).parent.parent


def _run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_version_is_printed():
    assert _run("--version").output == f"fastlm {fastlm.__version__}\n"


def test_doctor_names_every_op_and_its_self_test_passes():
    result = _run("doctor")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in OPS)
    assert ", 0 failed" in result.output


def test_doctor_json_prints_json_only(monkeypatch):
    monkeypatch.setattr(doctor, "verdicts", lambda *_: [])  # the test above ran them
    found = json.loads(_run("doctor", "--json").stdout)
    assert set(found["kernels"]) == set(OPS)
    assert found["instruction_set"] == _load.ISA
    assert found["kernels"]["layer_norm"]["cpu"] == _load.MISSING["cpu"]
    assert found["kernels"]["layer_norm"]["reference"] is None
    assert 0 < found["self_test"]["checks"] <= found["self_test"]["of"]


def test_doctor_says_why_a_kernel_cannot_run(monkeypatch):
    monkeypatch.setitem(_load.MISSING, "cpu", "no compiler was found")
    result = _run("doctor")
    assert result.exit_code == 0
    assert re.search(r"\(\d\) no compiler was found", result.output)
    assert "0 of 0 checks" in result.output


def test_doctor_fails_where_a_kernel_breaks_the_rule(monkeypatch):
    monkeypatch.setattr(doctor, "verdicts", lambda *_: [Verdict("output 0", 3.0, 1.0)])
    result = _run("doctor")
    assert result.exit_code == 1
    assert "layer_norm.cpu row float32: output 0: error 3.000e+00" in result.output


def test_doctor_fails_where_a_kernel_raises(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(doctor, "verdicts", broken)
    result = _run("doctor", "--json")
    assert result.exit_code == 1
    assert "raised RuntimeError: out of registers" in json.loads(result.stdout)["self_test"]["failed"][0]


def test_self_test_stops_when_its_time_is_up():
    assert doctor.self_test(limit_s=0.0)["checks"] <= 1


def _text(folder, content: bytes):
    file = folder / "text.txt"
    file.write_bytes(content)
    return file


DEMO_ERRORS = {
    "missing text": (lambda t: ["--text", t / "none.txt"], "No such file"),
    "a folder as text": (lambda t: ["--text", t], "Is a directory"),
    "empty text": (lambda t: ["--text", _text(t, b" \n")], "is empty"),
    "binary text": (lambda t: ["--text", _text(t, bytes(range(256)) * 100)], "not a UTF-8 text"),
    "zero bytes": (lambda t: ["--text", _text(t, bytes(1000))], "holds a zero byte"),
    "too short text": (lambda t: ["--text", _text(t, b"a few words")], "too short"),
    "no steps": (lambda t: ["--steps", 0], "--steps must be at least 1, got 0"),
    "unknown device": (lambda t: ["--device", "abacus"], "--device abacus cannot be used"),
    "out is a file": (lambda t: ["--out", _text(t, b"mine")], "cannot write"),
    "out below a file": (lambda t: ["--out", _text(t, b"mine") / "x"], "cannot write"),
}


@pytest.mark.parametrize("name", DEMO_ERRORS)
def test_demo_error_is_one_line_and_leaves_nothing(name, tmp_path):
    arguments, said = DEMO_ERRORS[name]
    out = tmp_path / "new" / "out"
    given = arguments(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = _run("demo", *(["--out", out] if "--out" not in given else []), *given)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.startswith("fastlm demo: ")
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_text_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    file = _text(tmp_path, b"words")
    monkeypatch.setattr(Path, "open", refuse)
    result = _run("demo", "--text", file, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (1, f"fastlm demo: cannot read {file}: Permission denied\n")


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "tokenizers" else name)
    result = _run("demo", "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (
        1,
        "fastlm demo: needs tokenizers: pip install 'fastlm[train]'\n",
    )


REPORT = {
    "steps": 2,
    "speedup": 2.0,
    "curves": {"together": True},
    "baseline": {"tokens_per_s": 1.0, "peak_mb": 1.0, "losses": [2.0, 1.0]},
    "fastlm": {"tokens_per_s": 2.0, "peak_mb": 1.0, "losses": [2.0, 1.0]},
}


def test_full_disk_keeps_the_old_results_and_leaves_no_half_of_the_new(tmp_path, monkeypatch):
    def half_written(file, report):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo, "_measure", lambda *_: REPORT)
    monkeypatch.setattr(demo_files, "_draw_throughput", half_written)
    (tmp_path / "report.json").write_text("old")
    result = _run("demo", "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (
        1,
        f"fastlm demo: cannot write {tmp_path}: No space left on device\n",
    )
    assert [f.name for f in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_results_replace_the_old_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_measure", lambda *_: REPORT)
    (tmp_path / "report.json").write_text("old")
    assert _run("demo", "--out", tmp_path).exit_code == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == ["loss.png", "report.json", "throughput.png"]
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT


def test_losses_that_part_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_measure", lambda *_: REPORT | {"curves": {"together": False}})
    result = _run("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "did not train alike" in result.stderr


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-u", "-m", "fastlm", "demo", "--out", str(tmp_path / "out")]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a background job
    )
    assert child.stdout.readline().startswith("Text: pydoc_data.topics")
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert (child.returncode, stderr) == (130, "fastlm demo: interrupted\n")
    assert list(tmp_path.iterdir()) == []
