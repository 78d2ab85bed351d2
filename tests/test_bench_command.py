"""fastlm bench as a command: what it writes is whole, what it cannot do is one line."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastlm import _load
from fastlm.bench import docs, models, results
from fastlm.bench.registry import WORKLOADS
from fastlm.cli.app import app

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"


def _run(*arguments):
    return CliRunner().invoke(app, ["bench", *(str(a) for a in arguments)])


def test_command_measures_the_tests_cases_and_writes_everything(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    case = ["--cases", "--op", "dropout_add", "-k", "odd", "--rounds", 2, "--memory", "off"]
    result = _run(*case, "--json", tmp_path / "found.json", "--plot", tmp_path / "images", "--docs", page)
    assert result.exit_code == 0, result.output
    found = results.read(tmp_path / "found.json")
    assert [results.title(row) for row in found["rows"]] == ["dropout_add odd"]
    assert len(found["rows"][0]["sides"]["fastlm"]["rounds_s"]) == 2
    assert {"device", "cpu", "instruction_set", "threads", "torch", "fastlm", "g++", "date"} <= set(
        found["machine"]
    )
    assert (tmp_path / "images" / "bench_ratios.png").exists()
    expected = f"before\n{docs.BEGIN}\n{docs.markdown(found, 'found.json')}\n{docs.END}\nafter\n"
    assert page.read_text() == expected
    again = _run("--from", tmp_path / "found.json", "--compare", tmp_path / "found.json")
    assert again.exit_code == 0 and "faster than before by" in again.output


def test_each_memory_mode_has_a_process_of_its_own(tmp_path):
    case = ["--cases", "--op", "dropout_add", "-k", "odd", "--rounds", 1, "--memory", "both"]
    result = _run(*case, "--baseline", "eager", "--json", tmp_path)
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("cpu-") and file.suffix == ".json"
    assert Counter(row["memory"] for row in results.read(file)["rows"]) == {"on": 1, "off": 1}


def _file(folder: Path, text: str) -> Path:
    file = folder / "given.json"
    file.write_text(text)
    return file


ERRORS = {
    "unknown op": (lambda t: ["--op", "sofmax"], "--op must be one of "),
    "unknown baseline": (
        lambda t: ["--baseline", "jax"],
        "--baseline must be one of eager, sdpa, compile, flex, sdpa_flash, flash_attn, liger, got jax",
    ),
    "unknown backend": (
        lambda t: ["--backend", "tpu"],
        "--backend must be one of cuda, triton, cpu, reference, got",
    ),
    "unknown dtype": (lambda t: ["--dtype", "int8"], "--dtype must be one of f32, bf16, f16, f64, got int8"),
    "unknown direction": (
        lambda t: ["--direction", "up"],
        "--direction must be one of forward, both, got up",
    ),
    "unknown model": (
        lambda t: ["--model", "gpt9"],
        "--model must be one of gpt2, gpt2_dropout, stress, got gpt9",
    ),
    "unknown memory mode": (
        lambda t: ["--memory", "some"],
        "--memory must be one of on, off, both, got some",
    ),
    "no rounds": (lambda t: ["--rounds", 0], "--rounds must be at least 1, got 0"),
    "no threads": (lambda t: ["--threads", 0], "--threads must be at least 1, got 0"),
    "unknown device": (lambda t: ["--device", "abacus"], "--device abacus cannot be used: "),
    "nothing chosen": (lambda t: ["-k", "no such", "--memory", "off"], "no workload's title holds 'no such'"),
    "a backend that refuses": (
        lambda t: ["-k", "one_row", "--backend", "cuda", "--memory", "off"],
        f"layer_norm one_row [1,64] f32 forward: {_load.MISSING['cuda']}",
    ),
    "nothing to compare": (lambda t: ["--compare", t / "none.json"], "none.json: No such file"),
    "not JSON": (lambda t: ["--from", _file(t, "{")], "is not JSON"),
    "another schema": (
        lambda t: ["--from", _file(t, '{"schema": 0}')],
        "is not a result of fastlm bench with schema 1",
    ),
    "a row that lacks": (
        lambda t: ["--from", _file(t, '{"schema": 1, "rows": [{"op": "x"}]}')],
        "has a row without workload, size",
    ),
    "json below a file": (lambda t: ["--json", _file(t, "") / "x.json"], "cannot write into"),
    "plots below a file": (lambda t: ["--plot", _file(t, "") / "x"], "cannot write into"),
    "a page without markers": (lambda t: ["--docs", _file(t, "")], "must hold <!-- bench:start -->"),
    "a page without a file": (lambda t: ["--docs", PAGE], "--docs needs --json or --from"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line(name, tmp_path):
    arguments, said = ERRORS[name]
    result = _run(*arguments(tmp_path))
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.startswith("fastlm bench: ")
    assert result.stderr.count("\n") == 1


def test_list_names_every_workload():
    told = _run("--list").stdout.splitlines()
    assert {w.title for w in WORKLOADS} < set(told)
    assert len(told) == len(set(told)) == len(WORKLOADS) + len(models.MODELS) + 1


def test_the_page_shows_what_its_results_file_holds():
    block = PAGE.read_text(encoding="utf-8").partition(docs.BEGIN)[2].partition(docs.END)[0].strip()
    link = block.partition("](")[2].partition(")")[0]
    found = results.read(PAGE.parent / link)
    assert block == docs.markdown(found, link), "run: fastlm bench --from FILE --docs docs/benchmarks.md"
    assert {"cpu", "instruction_set", "threads", "torch", "fastlm", "g++", "date"} <= set(found["machine"])


def test_pytest_benchmark_walks_the_same_workloads():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
        "-v",
    ]
    chosen = "one_row and (eager or cpu)"
    done = subprocess.run([*command, "-k", chosen], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "bench_forward[layer_norm-one_row-cpu-f32]" in done.stdout
    assert "2 passed" in done.stdout
