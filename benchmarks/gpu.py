"""make gpu: all tests and benchmarks on this machine's NVIDIA GPU, unattended, within ten minutes.

Finds a Python whose torch sees the GPU (the one given, .venv's, or python3's), builds fastlm for it, runs all
tests that run on a GPU, of the cuda and triton backends, then `fastlm bench --device cuda` with both. A
step that fails or lasts too long costs its own results only. Writes benchmarks/results/<gpu>-<date>.json,
pictures in a folder of that name beside it, and the output of the steps in build/gpu. What had no time is
done by `make gpu ARGS=--resume`: tests that have not passed, rows that were left out. To begin it needs the
standard library alone.

Exit status: 0, all passed; 1, something failed or was left out, and the rest is written; 2, it could not
begin; 3, no GPU.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from gpu_records import RESUME, add_tests, counted, digest_of_sources, outcomes, write

ROOT = Path(__file__).resolve().parent.parent
LOGS, RESULTS, OVERLAY = ROOT / "build" / "gpu", ROOT / "benchmarks" / "results", ROOT / ".venv-gpu"
LIMIT_S = 570.0  # of everything
TESTS_SHARE = 0.45  # of the time that is left when they begin; on an H100 machine 212 s were not quite enough
NEEDED = (
    "setuptools>=77 numpy typer>=0.12 rich>=13 pytest>=8.2 pytest-xdist>=3.6 hypothesis>=6.100"
    " matplotlib>=3.8"
)

# What a Python has to do with the GPU, as one line of JSON.
PROBE = """
import importlib.util, json, sys
found = {"python": sys.executable, "site": [p for p in sys.path if p.endswith("-packages")]}
found["pip"] = importlib.util.find_spec("pip") is not None
try:
    import torch, triton
    found |= {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0)}
    else:
        found["missing"] = f"its torch {torch.__version__} sees no GPU"
except ImportError as error:
    found["missing"] = f"no module {error.name}"
print(json.dumps(found))
"""


class CannotBegin(Exception):
    """Its message is the one line that the user reads."""


def gpu_missing(load: Callable = ctypes.CDLL) -> str | None:
    """None if the NVIDIA driver reports a GPU, else why not, in a few words; takes no time."""
    try:
        driver = load("libcuda.so.1")
    except OSError:
        return "the NVIDIA driver (libcuda.so.1) is not installed"
    count = ctypes.c_int(0)
    for call, arguments in ((driver.cuInit, (0,)), (driver.cuDeviceGetCount, (ctypes.byref(count),))):
        code = call(*arguments)
        if code != 0:
            return f"the NVIDIA driver answers with error {code}"
    return None if count.value else "the NVIDIA driver reports none"


def probe(python: str) -> dict:
    """What PROBE says of a Python; "missing" says why it cannot be used."""
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=120)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return {"python": python, "missing": "it does not run"}


def choose(given: str | None, look: Callable[[str], dict] = probe) -> dict:
    """What is known of the first Python whose torch and Triton see the GPU. Raises: CannotBegin."""
    own = ROOT / ".venv" / "bin" / "python"
    candidates = [given] if given else [*([str(own)] if own.exists() else []), "python3"]
    reasons = []
    for python in candidates:
        found = look(python)
        if "missing" not in found:
            return found
        reasons.append(f"{python}: {found['missing']}")
    if not given and not own.exists():
        say(f"Installing torch into .venv, for there is none ({'; '.join(reasons)}): this takes minutes more")
        if subprocess.run(["make", "setup"], cwd=ROOT).returncode == 0:
            return choose(str(own), look)
    raise CannotBegin(f"no Python whose torch sees the GPU ({'; '.join(reasons)}): make gpu PYTHON=...")


def overlay(facts: dict) -> str:
    """A Python with all that the given one has, into which more may be installed: .venv itself, or .venv-gpu.

    A user's own environment, or the system's, is left as it is. Raises: CannotBegin.
    """
    if Path(facts["python"]).parent == ROOT / ".venv" / "bin":
        return facts["python"]
    shutil.rmtree(OVERLAY, ignore_errors=True)
    seen_there = ["--without-pip"] if facts["pip"] else []  # a bare Debian cannot put one there
    asked = [facts["python"], "-m", "venv", *seen_there, str(OVERLAY)]
    made = subprocess.run(asked, capture_output=True, text=True)
    if made.returncode != 0:
        raise CannotBegin(f"{facts['python']} cannot make {OVERLAY}: apt-get install python3-venv")
    (site,) = OVERLAY.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({folder!r})" for folder in facts["site"]]
    (site / "given.pth").write_text("\n".join(lines) + "\n")
    return str(OVERLAY / "bin" / "python")


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


@dataclass
class Run:
    """The steps' time and surroundings.

    deadline: on time.monotonic's clock. resume: to do only what an earlier run has not done.
    """

    python: str
    facts: dict
    deadline: float
    resume: bool = False

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def step(self, name: str, command: list[str], limit_s: float, **variables: str) -> int | None:
        """Runs `python -m command`, its output in build/gpu/<name>.log; the status, or None for too long."""
        major, minor = self.facts["capability"]
        environment = os.environ | {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"} | variables
        LOGS.mkdir(parents=True, exist_ok=True)
        with open(LOGS / f"{name}.log", "ab+") as log:
            log.seek(0)
            log.truncate(log.read().rfind(b"\n") + 1)  # a step that was ended may have left half a line
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            begun = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
            child = subprocess.Popen([self.python, "-m", *command], start_new_session=True, **begun)
            try:
                return child.wait(max(limit_s, 1.0))
            except BaseException as error:
                os.killpg(child.pid, signal.SIGKILL)  # pytest's workers too
                child.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                return None


def build(run: Run) -> bool:
    """Installs what is missing and compiles fastlm for this GPU; whether that went well."""
    pip = ["pip", "install", "-q", "--disable-pip-version-check"]
    code = run.step("build", [*pip, *NEEDED.split()], run.left / 2)
    if code == 0:
        code = run.step("build", [*pip, "--no-deps", "--no-build-isolation", "-e", "."], run.left / 2)
    say(f"Build: {'done' if code == 0 else f'failed, see {LOGS}/build.log'}")
    return code == 0


def test(run: Run) -> dict:
    """Runs all tests that run on the GPU, and says how many passed; what failed is named.

    A run that is resumed leaves out those that have passed.
    """
    workers, log = str(max(1, min(14, os.cpu_count() or 1))), LOGS / "tests.log"
    passed = [name for name, word in outcomes(log).items() if word == "PASSED"] if run.resume else []
    LOGS.mkdir(parents=True, exist_ok=True)
    whole = [name for name in passed if name.endswith("]")]  # pytest deselects what begins so
    (LOGS / "passed.txt").write_text("".join(f"--deselect={name}\n" for name in whole))
    asked = ["-v", "--color=no", "-p", "no:cacheprovider", "-m", "not slow and not gpu_model"]
    asked += ["-k", "not -cpu-", "tests/test_gpu.py", "tests/test_ops.py"]  # the CPU's own are make test's
    begin = time.monotonic()
    limit = run.left * TESTS_SHARE
    asked = ["pytest", "-n", workers, *asked, f"@{LOGS / 'passed.txt'}"]
    code = run.step("tests", asked, limit, OMP_NUM_THREADS="1")
    found = counted(outcomes(log))
    found |= {"ended": code is not None, "status": code, "seconds": round(time.monotonic() - begin)}
    counts = f"{found['passed']} passed, {len(found['failed'])} failed"
    before = f", {len(passed)} of them before" if passed else ""
    more = "" if found["ended"] else f", and the time was up before all had run: {RESUME}"
    say(f"Tests: {counts} in {found['seconds']} s{before}{more}: {log}")
    return found


def bench(run: Run, file: Path) -> bool:
    """Runs `fastlm bench` on the GPU until it is done or the time is up; whether all of fastlm's ran.

    If it dies or hangs, it goes on with the next measurement: what it was at is noted as failed.
    """
    asked = ["fastlm", "bench", "--device", "cuda", "--rounds", "5", "--json", str(file)]
    asked += ["--backend", "cuda", "--backend", "triton"]  # is dispatch right to prefer the first?
    asked += ["--plot", str(file.with_suffix(""))]
    part, resume = file.with_name(f"{file.name}.part"), run.resume  # part: the results so far
    if not resume:
        part.unlink(missing_ok=True)
    code: int | None = 1
    for _ in range(10):
        limit = max(0.0, run.left - 30)
        options = [*["--resume"] * resume, "--limit", f"{limit:.0f}"]
        code = run.step("bench", [*asked, *options], max(limit, 0.0) + 60)
        if code is not None and not part.exists():
            break  # the results are in their file
        resume = run.resume or part.exists()
    return code == 0


def file_of(gpu: str) -> Path:
    """benchmarks/results/<gpu>-<date>.json."""
    name = re.sub("[^a-z0-9.]+", "-", gpu.lower()).strip("-")
    return RESULTS / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.json"


def begun(facts: dict, resume: bool) -> Path:
    """The results' file of a new run, which is noted in build/gpu, or of the one to resume.

    Raises: CannotBegin where there is none, or what it has shown may no longer hold.
    """
    note = LOGS / "begun.json"
    now = {n: facts[n] for n in ("gpu", "torch", "triton")} | {"sources": digest_of_sources(ROOT)}
    if not resume:
        shutil.rmtree(LOGS, ignore_errors=True)
        file = file_of(facts["gpu"])
        write(note, now | {"file": file.name})
        return file
    if not note.exists():
        raise CannotBegin("--resume: no earlier make gpu has left anything in build/gpu")
    earlier = json.loads(note.read_text(encoding="utf-8"))
    changed = [name for name in now if earlier[name] != now[name]]
    if changed:
        raise CannotBegin(f"--resume: since the earlier run has changed: {', '.join(changed)}; begin anew")
    return RESULTS / earlier["file"]


def everything(given: str | None, limit_s: float, resume: bool = False) -> int:
    """All the steps; the exit status. Raises: CannotBegin."""
    deadline = time.monotonic() + limit_s
    facts = choose(given)
    arch = "sm_{}{}".format(*facts["capability"])
    say(f"{facts['gpu']}, {arch}, torch {facts['torch']}, triton {facts['triton']}, {facts['python']}")
    file = begun(facts, resume)
    run, tests, measured = Run(overlay(facts), facts, deadline, resume), None, False
    try:
        build(run)
        tests = test(run)
        measured = bench(run, file)
    finally:
        found = add_tests(file, facts, tests, resume)
        left = f", {len(found['left_out'])} left out: {RESUME}" if "left_out" in found else ""
        failures = f"{len(found.get('failures', []))} failures"
        say(f"Bench: {len(found['rows'])} rows, {failures}{left}: {LOGS}/bench.log")
        say(f"Wrote {file} and the pictures in {file.with_suffix('')}")
    passed = tests is not None and tests["status"] == 0
    return 0 if passed and measured and "left_out" not in found else 1


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="a Python with torch and triton")
    parser.add_argument("--resume", action="store_true", help="do what the last run had no time for")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for everything")
    given = parser.parse_args(arguments)
    reason = gpu_missing()
    if reason is not None:
        print(f"make gpu: no NVIDIA GPU here: {reason}", file=sys.stderr)
        return 3
    try:
        return everything(given.python, given.limit, given.resume)
    except CannotBegin as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make gpu: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
