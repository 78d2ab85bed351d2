"""The package installs everywhere: with and without a compiler, as a wheel and editable, beside `kernels`."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, path: Path, **environment) -> str:
    """Runs code in a new process that finds packages in `path` first; returns what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(path)} | environment,
        cwd=path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_package_called_kernels_wins_over_the_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("mark = 'the real one'")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import kernels; print(kernels.mark)"
    )
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert python(code, tmp_path) == "the real one"


def test_import_costs_little_more_than_torchs():
    code = "import time, torch; t = time.perf_counter(); import fastlm; print(time.perf_counter() - t)"
    assert min(float(python(code, ROOT)) for _ in range(3)) < 1.5


def build(tmp_path: Path, **environment) -> Path:
    """Builds a wheel of a copy of the sources and unpacks it; returns the folder to import from."""
    source, out = tmp_path / "source", tmp_path / "wheel"
    ignored = [
        "--exclude=.git",
        "--exclude=.venv",
        "--exclude=build",
        "--exclude=*.so",
        "--exclude=_build.json",
    ]
    source.mkdir()
    archive = subprocess.run(["tar", "-c", *ignored, "."], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=source, check=True, input=archive)
    if (
        "CXX" not in environment and (ROOT / "build").is_dir()
    ):  # objects that are up to date are not made again
        subprocess.run(["cp", "-rp", str(ROOT / "build"), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, env=os.environ | environment, capture_output=True)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    return tmp_path / "site"


EXPLAIN = """
import torch, fastlm, json
e = fastlm.explain("layer_norm", torch.ones(2, 8))
y = fastlm.ops.layer_norm(torch.randn(2, 8))
print(json.dumps({"file": fastlm.__file__, "chosen": e.chosen, "cpu": e.reasons["cpu"]}))
"""


def test_a_wheel_has_the_kernels_and_the_types(tmp_path):
    site = build(tmp_path)
    found = json.loads(python(EXPLAIN, site))
    assert found["file"].startswith(str(site))
    assert (found["chosen"], found["cpu"]) == ("cpu", None)
    assert (site / "fastlm" / "py.typed").exists()
    assert not (site / "kernels").exists()


def test_without_a_compiler_the_install_works_and_says_why(tmp_path):
    site = build(tmp_path, CXX="no-such-compiler")
    found = json.loads(python(EXPLAIN, site))
    assert found["file"].startswith(str(site))
    assert found["chosen"] == "reference"
    assert "was not built" in found["cpu"] and "no-such-compiler" in found["cpu"]
    assert "pip install --no-build-isolation" in found["cpu"]


def test_a_build_for_another_torch_is_one_sentence(tmp_path):
    (tmp_path / "fastlm").mkdir()
    for file in (ROOT / "fastlm").rglob("*.py"):
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    for library in (ROOT / "fastlm").glob("_cpu_*"):
        (tmp_path / "fastlm" / library.name).symlink_to(library)
    (tmp_path / "fastlm" / "_build.json").write_text(json.dumps({"torch": "1.0.0", "failed": {}}))
    reason = json.loads(python(EXPLAIN, tmp_path))["cpu"]
    assert reason.startswith("rebuild: fastlm._cpu_") and "was built for torch 1.0.0, running" in reason


@pytest.mark.parametrize("op", ["layer_norm"])
def test_an_op_lives_in_at_most_six_files_beside_its_cases(op):
    """csrc: the contract, the kernel, the binding; fastlm: the op, its public name; the changelog says so."""
    folders = ("csrc", "fastlm")
    files = [f for d in folders for f in (ROOT / d).rglob("*") if f.suffix in (".py", ".h", ".cpp", ".cu")]
    mine = [f for f in files if op in f.read_text() and "testing" not in f.parts and "nn" not in f.parts]
    declared = {
        f"csrc/contract/{op}.h",
        f"csrc/cpu/{op}.cpp",
        f"csrc/bindings/{op}.cpp",
        f"fastlm/_ops/{op}.py",
    }
    found = {str(f.relative_to(ROOT)) for f in mine if f"{op}" in _names(f)}
    assert declared | {"fastlm/ops.py"} <= found
    assert len(found) <= 6, sorted(found)


def _names(file: Path) -> set[str]:
    """The names that a file declares, registers or imports; those who only call the op do none of it."""
    text = file.read_text()
    if file.suffix != ".py":
        return {
            w.split("_forward")[0].split("_backward")[0].strip('".') for w in text.replace("(", " ").split()
        }
    if "integrations" in file.parts or "cli" in file.parts:
        return set()
    tree = ast.parse(text)
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    return names | {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
