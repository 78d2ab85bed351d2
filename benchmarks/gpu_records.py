"""What make gpu reads of its own logs and sources, and how it writes. The standard library alone."""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

_SOURCES = ("csrc", "kernels", "fastlm", "tests", "benchmarks")  # what a run has shown hangs on these
RESUME = "make gpu ARGS=--resume"


def digest_of_sources(root: Path) -> str:
    """One for all sources below a repository's root; of other sources another."""
    found = hashlib.sha256()
    for name in _SOURCES:
        for file in sorted((root / name).rglob("*.*")):
            if file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                found.update(file.read_bytes())
    return found.hexdigest()


def outcomes(log: Path) -> dict[str, str]:
    """Each test's last outcome, PASSED or another word, by the whole lines of pytest -v with workers."""
    text = log.read_text(errors="replace") if log.exists() else ""
    words = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    lines = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({words}) (\S.*)\n", text, re.M)
    return {name.strip(): word for word, name in lines}


def counted(tests: dict[str, str]) -> dict:
    """{"passed", "skipped": how many, "failed": which}."""
    counts = Counter(tests.values())
    failed = [name for name, word in tests.items() if word in ("FAILED", "ERROR", "XPASS")]
    return {"passed": counts["PASSED"], "skipped": counts["SKIPPED"] + counts["XFAIL"], "failed": failed}


def write(file: Path, content: dict) -> None:
    """As JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def add_tests(file: Path, facts: dict, tests: dict | None, resume: bool = False) -> dict:
    """Puts the tests' results into the results' file, made if there is none; returns its content."""
    found = {"schema": 1, "machine": {}, "options": {}, "rows": []}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    command = RESUME if resume else "make gpu"
    found |= {"tests": tests, "made_by": {"command": command, **{n: facts[n] for n in ("gpu", "triton")}}}
    write(file, found)
    return found
