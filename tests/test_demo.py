"""The demo: one small run of the whole job, and the checks that it rests on."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fastlm
from fastlm import _load
from fastlm.cli import demo, demo_text, demo_train
from fastlm.cli.demo_model import Size, make_model
from fastlm.cli.errors import CommandError
from fastlm.examples import plain_gpt

ROOT = Path(__file__).parent.parent
SMALL = Size(vocab=512, dim=32, heads=2, layers=2, context=32, batch=2)


@pytest.fixture(scope="module")
def small_text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(demo_text.read_text(None)[:20_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def small_run(small_text, tmp_path_factory):
    """(report.json's content, its folder, what was printed) of a run of two steps."""
    out = tmp_path_factory.mktemp("demo")
    console = Console(record=True, file=io.StringIO())
    demo.run(demo.Options(text=small_text, steps=2, out=out, size=SMALL), console)
    return json.loads((out / "report.json").read_text()), out, console.export_text()


def test_report_holds_what_it_promises(small_run):
    report = small_run[0]
    promised = {"device", "torch", "steps", "parity", "baseline", "fastlm", "speedup", "sample"}
    assert promised <= set(report)
    assert {"max_error_ratio", "passed"} <= set(report["parity"])
    assert {"tokens_per_s", "peak_mb", "losses"} <= set(report["baseline"])
    assert {"tokens_per_s", "peak_mb", "losses", "backends", "version"} <= set(report["fastlm"])


def test_parity_is_proved(small_run):
    parity = small_run[0]["parity"]
    assert parity["passed"] is True
    assert 0 <= parity["max_error_ratio"] <= 1


def test_both_models_train(small_run):
    report = small_run[0]
    for side in ("baseline", "fastlm"):
        assert len(report[side]["losses"]) == 2
        assert all(math.isfinite(loss) for loss in report[side]["losses"])
        assert report[side]["tokens_per_s"] > 0
        assert report[side]["peak_mb"] > 50
    assert report["speedup"] == report["fastlm"]["tokens_per_s"] / report["baseline"]["tokens_per_s"]


def test_every_op_of_the_step_ran_on_its_kernel(small_run):
    backends = small_run[0]["fastlm"]["backends"]
    assert "layer_norm" in backends
    assert set(backends.values()) == {"cpu" if _load.MISSING["cpu"] is None else "reference"}


def test_files_are_the_three_promised_and_nothing_else(small_run):
    out = small_run[1]
    assert sorted(f.name for f in out.iterdir()) == ["loss.png", "report.json", "throughput.png"]
    for picture in ("loss.png", "throughput.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_what_is_printed_tells_the_result(small_run):
    printed = small_run[2]
    for said in (
        "2x rule",
        "training tokens/s",
        "peak memory",
        "they stay together",
        "Written by the patched model",
    ):
        assert said in printed


def test_a_model_that_computes_something_else_is_refused(small_text, tmp_path, monkeypatch):
    real = fastlm.patch

    def wrong(model):
        report = real(model)
        with torch.no_grad():
            model.head.bias += 1e-3
        return report

    monkeypatch.setattr(fastlm, "patch", wrong)
    with pytest.raises(CommandError, match="does not compute the same: logits"):
        demo.run(demo.Options(small_text, 1, out=tmp_path / "out", size=SMALL), Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_curves_that_part_are_told_from_curves_that_stay_together():
    falling = [8.0 - 0.1 * i for i in range(20)]
    assert demo_train.curves(falling, falling) == {
        "fell": True,
        "together": True,
        "mean_relative_distance": 0.0,
    }
    assert demo_train.curves(falling, [8.0] * 20)["together"] is False
    assert demo_train.curves(falling, falling[::-1])["fell"] is False
    assert demo_train.curves([8.0], [8.0])["fell"] is None


def test_throughput_leaves_the_warm_up_out():
    run = demo_train.Run(seconds=[50.0, 40.0, 30.0, 2.0, 2.0, 4.0])
    assert run.tokens_per_s(100) == 50.0
    assert demo_train.Run(seconds=[5.0]).tokens_per_s(100) == 20.0


def test_models_train_in_turn_in_alternating_order(monkeypatch):
    order = []
    monkeypatch.setattr(demo_train, "make_optimizer", lambda model: None)
    monkeypatch.setattr(demo_train, "train_step", lambda model, *_: order.append(model) or 1.0)
    pairs = [(torch.zeros(1), torch.zeros(1))] * 3
    demo_train.train_in_turn({"a": "A", "b": "B"}, pairs, lambda: None)
    assert "".join(order) == "ABBAAB"


def test_an_op_that_runs_by_its_reference_is_reported_so():
    class Norm(torch.nn.Module):
        def forward(self, x, _):
            return fastlm.ops.layer_norm(x * 1.0, backend="reference").sum()

    x = torch.randn(3, 8, requires_grad=True)
    assert demo_train.backends_of_a_step(Norm(), x, x) == {"layer_norm": "reference"}


def test_default_text_gives_a_vocabulary_of_at_least_2048():
    text = demo_text.read_text(None)
    tokenizer = demo_text.train_tokenizer(text, Size().vocab)
    assert tokenizer.get_vocab_size() >= 2048
    sample = text[:500] + "naïve ☃"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_batches_are_the_tokens_and_the_tokens_after_them():
    tokens = torch.arange(100)
    for x, y in demo_text.batches(tokens, 3, batch=4, context=8, seed=1):
        assert x.shape == y.shape == (4, 8)
        assert torch.equal(x + 1, y)


def test_the_example_is_plain_torch_and_shown_once():
    shown = ROOT / "examples" / "plain_gpt.py"
    assert shown.samefile(plain_gpt.__file__)
    assert "fastlm" not in shown.read_text()


def test_plain_model_does_not_look_ahead():
    model = make_model(SMALL, torch.device("cpu")).eval()
    tokens = torch.randint(SMALL.vocab, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = 0
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, :10], model(changed)[:, :10])
