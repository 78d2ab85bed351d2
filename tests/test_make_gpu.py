"""make gpu, as far as a machine without a GPU can show it: it ends at once, and no failure loses the rest."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastlm.bench import machine, results

ROOT = Path(__file__).parent.parent
FACTS = {"python": sys.executable, "gpu": "NVIDIA A100-SXM4-80GB", "capability": [8, 0], "site": []}
FACTS |= {"torch": "2.13.0", "triton": "3.8.0", "pip": True}


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The script as a module, writing below tmp_path."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script that lies there
    spec = importlib.util.spec_from_file_location("make_gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_gpu", module)
    spec.loader.exec_module(module)
    for name in ("LOGS", "RESULTS", "OVERLAY"):
        monkeypatch.setattr(module, name, tmp_path / name.lower())
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu would run everything")
def test_without_a_gpu_it_ends_at_once_with_one_line():
    begin = time.monotonic()
    # Not as a part of the make that runs these tests: a make within a make reports the directories it enters.
    inside = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")
    outside = {key: value for key, value in os.environ.items() if key not in inside}
    done = subprocess.run(["make", "gpu"], cwd=ROOT, env=outside, capture_output=True, text=True)
    assert time.monotonic() - begin < 10
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert done.returncode != 0 and done.stdout == ""
    assert len(ours) == 1 and ours[0].startswith("make gpu: no NVIDIA GPU here: the NVIDIA driver ")


def test_the_exit_status_without_a_gpu_is_documented(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "gpu_missing", lambda: "the NVIDIA driver reports none")
    assert gpu.main([]) == 3
    assert capsys.readouterr().err == "make gpu: no NVIDIA GPU here: the NVIDIA driver reports none\n"
    assert "3, no GPU" in gpu.__doc__


def _driver(init: int, count: int):
    def counted(pointer):
        pointer._obj.value = count
        return 0

    return lambda name: SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=counted)


def test_the_driver_says_whether_there_is_a_gpu(gpu):
    def none(name):
        raise OSError(name)

    assert gpu.gpu_missing(none) == "the NVIDIA driver (libcuda.so.1) is not installed"
    assert gpu.gpu_missing(_driver(100, 0)) == "the NVIDIA driver answers with error 100"
    assert gpu.gpu_missing(_driver(0, 0)) == "the NVIDIA driver reports none"
    assert gpu.gpu_missing(_driver(0, 2)) is None


def test_a_python_is_chosen_that_sees_the_gpu(gpu, tmp_path, monkeypatch):
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    seen = {str(own): {"missing": "its torch 2.13.0+cpu sees no GPU"}, "python3": FACTS}
    assert gpu.choose(None, seen.get) is FACTS
    assert gpu.choose("python3", seen.get) is FACTS
    with pytest.raises(
        gpu.CannotBegin, match=r"\(.*python: its torch 2.13.0\+cpu sees no GPU\): make gpu PYT"
    ):
        gpu.choose(str(own), seen.get)


def test_this_python_is_probed(gpu):
    found = gpu.probe(sys.executable)
    assert found["python"] == sys.executable and found["site"]
    assert ("missing" in found) != torch.cuda.is_available()
    assert gpu.probe("/no/such/python")["missing"] == "it does not run"


@pytest.mark.parametrize("pip", [True, pytest.param(False, marks=pytest.mark.slow)])  # slow: it is installed
def test_a_given_python_is_left_as_it_is(gpu, tmp_path, monkeypatch, pip):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # the Python of these tests is not its own
    made = gpu.overlay(gpu.probe(sys.executable) | {"pip": pip})
    assert made == str(gpu.OVERLAY / "bin" / "python")
    code = "import torch, sys; print(torch.__version__, sys.prefix)"
    said = subprocess.run([made, "-c", code], capture_output=True, text=True).stdout.split()
    assert said == [torch.__version__, str(gpu.OVERLAY)]  # it has what the given one has
    subprocess.run([made, "-m", "pip", "--version"], check=True)


LOG = """
[gw0] [  1%] PASSED tests/test_ops.py::test_kernel[softmax-triton-row-float32]
[gw1] [ 50%] FAILED tests/test_ops.py::test_kernel[attention-triton-odd mask-float16]
[gw1] [ 99%] SKIPPED tests/test_a.py::test_b
[gw0] [100%] ERROR tests/test_a.py::test_c
"""


def test_tests_are_counted_from_what_was_printed_so_far(gpu, tmp_path):
    (tmp_path / "log").write_text(LOG)
    failed = ["tests/test_ops.py::test_kernel[attention-triton-odd mask-float16]", "tests/test_a.py::test_c"]
    found = gpu.outcomes(tmp_path / "log")
    assert gpu.counted(found) == {"passed": 1, "skipped": 1, "failed": failed}
    assert gpu.counted(gpu.outcomes(tmp_path / "none")) == {"passed": 0, "skipped": 0, "failed": []}


def test_half_a_line_of_a_step_that_was_ended_is_no_tests_name(gpu):
    log = gpu.LOGS / "tests.log"
    log.parent.mkdir()
    log.write_text(f"{LOG}[gw0] [100%] PASSED tests/test_ops.py::test_ker")
    names = list(gpu.outcomes(log))
    assert len(names) == 4 and names[-1] == "tests/test_a.py::test_c"
    _run(gpu).step("tests", ["platform"], 30.0)
    assert f"{LOG}$ platform\n" in log.read_text() and list(gpu.outcomes(log)) == names


SOME_TESTS = """
import pytest
from pathlib import Path
@pytest.mark.parametrize("name", ["passes", "has a space", "a-cpu-b", "fails"])
def test_it(name):
    assert name != "fails" or (Path(__file__).parent / "mended").exists()
def test_it_alone():
    pass
def test_it_alone_again():
    assert (Path(__file__).parent / "mended").exists()
"""


def test_a_resumed_run_tests_only_what_has_not_passed(gpu, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    for name in ("test_gpu.py", "test_ops.py"):
        (tmp_path / "tests" / name).write_text(SOME_TESTS)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 1)
    files = ("test_gpu.py", "test_ops.py")
    fails = [f"tests/{file}::{test}" for file in files for test in ("test_it[fails]", "test_it_alone_again")]
    first = gpu.test(_run(gpu, 900.0))
    assert (first["passed"], first["failed"], first["status"]) == (6, fails, 1)
    (tmp_path / "tests" / "mended").touch()
    second = gpu.test(_run(gpu, 900.0, resume=True))
    assert (second["passed"], second["failed"], second["status"]) == (10, [], 0)
    third = gpu.test(_run(gpu, 900.0, resume=True))
    assert (third["passed"], third["ended"], third["status"]) == (10, True, 0)
    lines = (gpu.LOGS / "tests.log").read_text().splitlines()
    runs = [sum(name in line for line in lines if " PASSED " in line) for name in ("[passes]", "[fails]")]
    assert runs == [2, 2]


def test_only_the_same_sources_on_the_same_gpu_are_resumed(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("a = 1")
    with pytest.raises(gpu.CannotBegin, match="no earlier make gpu has left"):
        gpu.begun(FACTS, True)
    file = gpu.begun(FACTS, False)
    monkeypatch.setattr(gpu, "file_of", lambda name: gpu.RESULTS / "of-another-day.json")
    assert gpu.begun(FACTS, True) == file
    with pytest.raises(gpu.CannotBegin, match=r"has changed: torch, triton; begin anew"):
        gpu.begun(FACTS | {"torch": "2.14.1", "triton": "3.9.0"}, True)
    (tmp_path / "kernels" / "a.py").write_text("a = 2")
    with pytest.raises(gpu.CannotBegin, match=r"has changed: sources; begin anew"):
        gpu.begun(FACTS, True)
    (gpu.LOGS / "tests.log").touch()
    assert gpu.begun(FACTS, False).name == "of-another-day.json" and not (gpu.LOGS / "tests.log").exists()


def test_the_file_is_named_after_gpu_and_date(gpu, monkeypatch):
    file = gpu.file_of(FACTS["gpu"])
    assert file.parent == gpu.RESULTS and file.name.startswith("nvidia-a100-sxm4-80gb-20")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: FACTS["gpu"])
    assert file.name.startswith(machine.device_name("cuda"))  # as fastlm bench calls it


def _run(gpu, seconds: float = 60.0, resume: bool = False):
    return gpu.Run(sys.executable, FACTS, time.monotonic() + seconds, resume)


def test_a_step_that_lasts_too_long_is_ended_with_its_children(gpu):
    begin = time.monotonic()
    assert (
        _run(gpu).step("slow", ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"], 1.0) is None
    )
    assert time.monotonic() - begin < 20
    assert _run(gpu).step("slow", ["platform"], 30.0) == 0
    assert "$ platform" in (gpu.LOGS / "slow.log").read_text()


class _Bench:
    """Instead of steps: plays what each call of `fastlm bench` does, and notes the commands."""

    def __init__(self, file: Path, *plays):
        self.file, self.plays, self.commands = file, list(plays), []

    def __call__(self, run, name, command, limit_s):
        self.commands.append(command)
        return self.plays.pop(0)(self.file)


def _dies(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_name(f"{file.name}.part").write_text("{}")
    return -11


def _hangs(file: Path) -> None:
    _dies(file)


def _ends(file: Path, code: int = 0) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_name(f"{file.name}.part").unlink(missing_ok=True)
    results.write(file, results.empty({"device": "a gpu"}, {}) | {"failures": []})
    return code


def test_bench_goes_on_after_it_died_or_hung(gpu, monkeypatch):
    file = gpu.file_of("a gpu")
    played = _Bench(file, _dies, _hangs, _ends)
    monkeypatch.setattr(gpu.Run, "step", lambda *a: played(*a))
    assert gpu.bench(_run(gpu), file)
    assert len(played.commands) == 3
    assert ["--resume" in command for command in played.commands] == [False, True, True]
    assert all("cuda" in command for command in played.commands)


def test_bench_of_a_resumed_run_goes_on_with_the_earlier_one(gpu, monkeypatch):
    file = gpu.file_of("a gpu")
    _dies(file)  # an earlier run, in the middle of a job
    seen = []

    def play(run, name, command, limit_s):
        seen.append(("--resume" in command, file.with_name(f"{file.name}.part").exists()))
        return _ends(file)

    monkeypatch.setattr(gpu.Run, "step", play)
    assert gpu.bench(_run(gpu, resume=True), file) and seen == [(True, True)]
    _dies(file)
    assert gpu.bench(_run(gpu), file) and seen[1:] == [(False, False)]


def test_bench_that_is_out_of_time_still_writes_what_it_has(gpu, monkeypatch):
    file = gpu.file_of("a gpu")
    played = _Bench(file, _hangs, lambda f: _ends(f, 1))
    monkeypatch.setattr(gpu.Run, "step", lambda *a: played(*a))
    assert not gpu.bench(_run(gpu, seconds=0.0), file)
    assert played.commands[-1][-2:] == ["--limit", "0"] and file.exists()


def _everything(gpu, monkeypatch, *, tests=None, bench=None, fail=None, asked=()):
    monkeypatch.setattr(gpu, "choose", lambda given: FACTS)
    monkeypatch.setattr(gpu, "overlay", lambda facts: sys.executable)
    monkeypatch.setattr(gpu, "build", lambda run: True)
    ended = {"passed": 3, "skipped": 0, "failed": [], "ended": True, "status": 0, "seconds": 1}
    monkeypatch.setattr(gpu, "test", lambda run: ended | (tests or {}))

    def measured(run, file):
        if fail is not None:
            raise fail
        return (bench or _ends)(file) == 0

    monkeypatch.setattr(gpu, "bench", measured)
    monkeypatch.setattr(gpu, "gpu_missing", lambda: None)
    status = gpu.main(list(asked))
    return status, results.read(gpu.file_of(FACTS["gpu"]))


def test_all_that_passed_is_status_0(gpu, monkeypatch, capsys):
    status, found = _everything(gpu, monkeypatch)
    assert status == 0 and found["tests"]["passed"] == 3 and found["machine"] == {"device": "a gpu"}
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("NVIDIA A100-SXM4-80GB, sm_80, torch 2.13.0, triton 3.8.0")
    assert told[-1].startswith("Wrote ")


def _leaves_out(file: Path) -> int:
    _ends(file)
    results.write(file, results.read(file) | {"left_out": ["rope"], "done": []})
    return 0


def test_rows_left_out_are_told_and_resumed(gpu, monkeypatch, capsys):
    status, found = _everything(gpu, monkeypatch, bench=_leaves_out)
    assert status == 1 and found["made_by"]["command"] == "make gpu"
    assert "Bench: 0 rows, 0 failures, 1 left out: make gpu ARGS=--resume: " in capsys.readouterr().out
    status, found = _everything(gpu, monkeypatch, asked=["--resume"])
    assert status == 0 and found["made_by"]["command"] == "make gpu ARGS=--resume"


def test_a_test_that_fails_loses_no_benchmark(gpu, monkeypatch):
    status, found = _everything(gpu, monkeypatch, tests={"failed": ["a test"], "status": 1})
    assert status == 1 and found["tests"]["failed"] == ["a test"] and found["machine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk")])
def test_a_benchmark_that_fails_loses_no_test(gpu, monkeypatch, error):
    if isinstance(error, OSError):
        with pytest.raises(OSError):
            _everything(gpu, monkeypatch, fail=error)
        found = results.read(gpu.file_of(FACTS["gpu"]))
    else:
        status, found = _everything(gpu, monkeypatch, fail=error)
        assert status == 130
    assert found["tests"]["passed"] == 3 and found["rows"] == []


def test_results_with_tests_are_read_back(gpu):
    file = gpu.file_of("a gpu")
    _ends_first = results.empty({"device": "a gpu"}, {})
    file.parent.mkdir(parents=True)
    results.write(file, _ends_first)
    gpu.add_tests(file, FACTS, {"passed": 1})
    found = results.read(file)
    assert found["tests"] == {"passed": 1} and found["made_by"]["gpu"] == FACTS["gpu"]
    assert json.loads(file.read_text()) == found and len(list(file.parent.iterdir())) == 1
