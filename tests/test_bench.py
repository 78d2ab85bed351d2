"""fastlm bench: how it takes turns, what it makes of the times, and what it writes."""

import errno
import json
import os
import struct

import pytest

from fastlm.bench import ceilings, clock, growth, measure, plots, report, results, sweep
from fastlm.bench.workload import Work
from fastlm.cli.errors import CommandError


def test_floor_is_the_larger_part_or_the_sum():
    rates = {"copy": 10.0, "read": 5.0, "mm": 100.0}
    assert ceilings.floor(Work(20.0, 100.0), rates) == {"seconds": 2.0, "of": "copy"}
    assert ceilings.floor(Work(20.0, 900.0), rates) == {"seconds": 9.0, "of": "mm"}
    assert ceilings.floor(Work(20.0, bound="read"), rates) == {"seconds": 4.0, "of": "read"}
    assert ceilings.floor(Work(20.0, 300.0, adds_up=True), rates) == {"seconds": 5.0, "of": "copy + mm"}
    assert ceilings.floor(None, rates) is None


def test_ceilings_are_bytes_and_flops_over_the_median():
    found = ceilings.Ceilings("cpu", "bf16")
    times = {name: [5.0, 1.0, 2.0] for name in found.steps}
    assert found.rates(times) == {"copy": 2 * 2**26 / 2, "read": 2**26 / 2, "mm": 2 * 1024**3 / 2}


class _Script:
    """A clock that tells each step's name and takes its seconds from a script."""

    sample_s, most_calls = 0.02, 100

    def __init__(self, seconds):
        self.told, self._seconds = [], seconds

    def seconds(self, step, calls):
        self.told.append((step(), calls))
        return self._seconds[step()]


def test_sides_take_turns_in_an_order_that_rotates():
    script = _Script({"a": 1.0, "b": 2.0, "c": 0.004})
    steps = {name: lambda name=name: name for name in "abc"}
    times = clock.interleaved(steps, 4, script)
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [0.004] * 4}
    rounds = "".join(name for name, _ in script.told[-12:])
    assert rounds == "abcbcacababc"
    assert dict(script.told[-3:]) == {"a": 1, "b": 1, "c": 5}  # short calls are repeated, up to 20 ms


def test_no_new_round_begins_after_the_limit():
    steps = {"a": lambda: "a", "b": lambda: "b"}
    times = clock.interleaved(steps, 9, _Script({"a": 1.0, "b": 1.0}), limit_s=0.0)
    assert times == {"a": [1.0], "b": [1.0]}


def test_medians_quartiles_and_ratios():
    assert measure.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median_s": 3.0,
        "min_s": 1.0,
        "quartiles_s": [2.0, 4.0],
        "rounds_s": [4.0, 1.0, 2.0, 3.0, 5.0],
    }
    found = measure.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])
    assert found == {"of_medians": 2.0, "quartiles": [2.0, 2.5]}
    assert measure.quartiles([7.0]) == [7.0, 7.0]


def _row(name="gpt2", memory="off", fastlm=(1.0, 1.0, 1.0), eager=(2.0, 2.0, 2.0)) -> dict:
    made = measure.Row("layer_norm", name, (4, 8), "f32", "both", {}, Work(16.0, 64.0))
    times = {"eager": list(eager), "compile": [3.0] * 3, "fastlm": list(fastlm)}
    rates = {"copy": 32.0, "read": 40.0, "mm": 1e4}
    return measure.row_of(made, times, rates) | {"memory": memory}


MACHINE = {"device": "cpu-avx2", "cpu": "A processor", "instruction_set": "avx2", "threads": 2}
MACHINE |= {"torch": "2.13.0", "fastlm": "0.1.0", "g++": None, "date": "2026-01-02T03:04:05+00:00"}


def _results(*rows) -> dict:
    return results.empty(MACHINE, {}) | {"rows": list(rows or [_row(), _row(memory="on")])}


def test_a_row_says_ratio_best_baseline_and_share():
    row = _row()
    assert row["best_baseline"] == "eager"
    assert row["ratios"]["fastlm"]["compile"]["of_medians"] == 3.0
    assert row["share_of_floor"] == {"fastlm": 0.5}
    (line,) = report.cells(row)
    expected = ["layer_norm gpt2 [4,8]", "2 s eager", "1 s ±0%", "2.00*", "3.00", "0.0 GB/s", "0.50 copy"]
    assert line == expected


def test_results_are_read_back_as_written(tmp_path):
    file = tmp_path / "found.json"
    results.write(file, _results())
    assert results.read(file) == json.loads(json.dumps(_results()))
    assert [f.name for f in file.parent.iterdir()] == ["found.json"]


def test_a_full_disk_keeps_the_old_results(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "found.json"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CommandError, match=f"cannot write {file}: No space left on device"):
        results.write(file, _results())
    assert [f.name for f in tmp_path.iterdir()] == ["found.json"]
    assert file.read_text() == "old"


def test_compare_divides_old_by_new_times():
    old, new = _results(_row(), _row("gone")), _results(_row(fastlm=(0.5, 0.5, 0.5)), _row("added"))
    found = {side: times for _, side, times in report.compared(old, new)}
    assert found == {"eager": 1.0, "compile": 1.0, "fastlm": 2.0}
    assert report.compared(_results(_row(memory="on")), _results(_row(memory="off"))) == []


def test_what_a_confident_step_costs_is_told_for_every_side():
    fresh, confident = _row("fresh"), _row("confident", fastlm=[1.5] * 3, eager=[8.0] * 3)
    told = report.stress_lines([row | {"op": "gpt_step"} for row in (fresh, confident)])
    assert told[0] == "A confident GPT's step costs 4.00 of a fresh one's in eager (memory off)."
    assert told[2] == "A confident GPT's step costs 1.50 of a fresh one's in fastlm (memory off)."


def _growth() -> dict:
    points = []
    for value in (256, 512, 1024, 2048):
        times = {"sdpa": measure.summary([value**2 * 1e-6]), "fastlm": measure.summary([value * 1e-5])}
        points.append(
            {"value": value, "size": [value], "sides": times, "peaks_mb": {"sdpa": 9.0, "fastlm": value}}
        )
    curve = {"op": "attention", "of": "sequence length", "points": points}
    one = {"op": "softmax", "workload": "causal", "size": [4], "threads": 2}
    one |= {"sides": {"one": measure.summary([2.0]), "all": measure.summary([1.0])}}
    one |= {"ratio": measure.ratio([2.0], [1.0])}
    return {"curves": [curve | {"exponents": growth.exponents(points)}], "threads": [one]}


def test_powers_are_fitted():
    powers = _growth()["curves"][0]["exponents"]
    assert powers["sdpa"]["time"] == pytest.approx(2.0)
    assert powers["fastlm"]["time"] == pytest.approx(1.0)
    assert powers["fastlm"]["memory"] == pytest.approx(1.0)
    assert powers["sdpa"]["memory"] == pytest.approx(0.0)
    assert growth.exponent([(1.0, 0.0), (2.0, 1.0)]) is None  # one point is no line


def test_plots_are_png_files_of_a_sensible_size(tmp_path):
    written = plots.write(tmp_path / "images", _results() | {"growth": _growth()})
    names = ["bench_ratios.png", "bench_roofline.png", "bench_growth_attention.png", "bench_threads.png"]
    assert [file.name for file in written] == names
    assert sorted(names) == sorted(f.name for f in (tmp_path / "images").iterdir())
    for file in written:
        content = file.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert 500 <= width <= 2000 and 150 <= height <= 2000


def test_a_size_counts_as_slower_only_beyond_the_noise():
    assert sweep.lost({"eager": [1.0] * 4, "fastlm": [1.1] * 4})
    assert not sweep.lost({"eager": [1.0] * 4, "fastlm": [0.9] * 4})
    assert not sweep.lost({"eager": [1.0] * 4, "fastlm": [1.2, 1.2, 1.05, 0.7]})
    assert sweep.lost({"eager": [2.0] * 4, "sdpa": [1.0] * 4, "fastlm": [1.1] * 4})  # the best one counts
