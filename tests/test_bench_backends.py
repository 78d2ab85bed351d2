"""Several backends of fastlm's beside each other in one row, as make gpu asks for them."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastlm.bench import plan, plots, report
from fastlm.bench.options import Options
from fastlm.bench.trial import tried

H200 = Path(__file__).parent.parent / "benchmarks" / "results" / "nvidia-h200-2026-11-26.json"


def _refusing():
    raise NotImplementedError("attention.cuda takes heads of 32, 64, 96, 128, 256")


def _running():
    return lambda: (torch.ones(2),)


def test_a_backend_that_refuses_is_noted_where_another_runs():
    steps, outputs, failed = tried({"fastlm.cuda": _refusing, "fastlm.triton": _running}, "cpu")
    assert list(steps) == list(outputs) == ["fastlm.triton"]
    assert failed == {
        "fastlm.cuda": "NotImplementedError: attention.cuda takes heads of 32, 64, 96, 128, 256"
    }


def test_where_every_backend_refuses_the_first_ones_reason_is_raised():
    with pytest.raises(NotImplementedError, match="attention.cuda takes heads"):
        tried({"eager": _running, "fastlm.cuda": _refusing, "fastlm.triton": _refusing}, "cpu")


def test_models_take_one_backend_or_each_ops_first(monkeypatch):
    asked = []

    def builders(gpt, device, baseline, backends):
        asked.append(backends)
        raise KeyboardInterrupt

    monkeypatch.setattr(plan.models, "builders", builders)
    for given in ([], ["cpu"], ["cuda", "triton"]):
        (_, job), *_ = plan.table(Options(model=["gpt2"], backend=given, baseline=[], parts=["table"]), {})
        with pytest.raises(KeyboardInterrupt):
            job()
    assert asked == [[None], ["cpu"], [None]]


def test_a_share_of_no_memory_is_left_out():
    row = {"op": "append_kv", "workload": "one_token", "size": [8], "dtype": "bf16", "direction": "forward"}
    table = report.peaks_table([row | {"peaks_mb": {"baseline": 0.0, "fastlm": 0.4}}])
    text = StringIO()
    Console(file=text, width=120).print(table)
    assert "–" in text.getvalue()


def test_the_roofline_shows_the_faster_backend():
    found = json.loads(H200.read_text())
    row = next(r for r in found["rows"] if r["op"] == "attention" and "fastlm.triton" in r["ratios"])
    found["rows"] = [row]
    labels = plots._roofline(found).axes[0].get_legend_handles_labels()[1]
    assert len(labels) == 1 and "fastlm.triton" in labels[0]
