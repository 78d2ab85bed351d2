"""How fastlm._cuda is built: architectures, the compiler that fits torch, jobs; else one sentence why not."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toolchain(monkeypatch):
    """csrc/cuda_toolchain.py, which belongs to no package."""
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    return importlib.import_module("cuda_toolchain")


def _nvcc(folder: Path, release: str) -> Path:
    """A compiler that says its version, and where its toolkit is."""
    file = folder / "bin" / "nvcc"
    file.parent.mkdir(parents=True)
    file.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("asked", "seen", "expected"),
    [
        ("8.0;9.0+PTX", [(8, 6)], ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]),
        ("9.0a, 12.0", [], ["arch=compute_90a,code=sm_90a", "arch=compute_120,code=sm_120"]),
        (None, [(9, 0), (9, 0), (8, 0)], ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90"]),
        ("", [(10, 3)], ["arch=compute_103,code=sm_103"]),
    ],
)
def test_architectures_are_those_asked_for_or_seen(toolchain, asked, seen, expected):
    assert toolchain.architectures(asked, seen) == [f"-gencode={e}" for e in expected]


def test_without_a_gpu_the_tested_architectures_are_built(toolchain):
    codes = toolchain.architectures(None, [])
    assert [c.split(",")[0] for c in codes] == [f"-gencode=arch=compute_{a}" for a in (80, 90, 100, 120)]


def test_a_source_counts_with_all_that_it_includes(toolchain, tmp_path):
    for name, includes in {"a.cu": ["b.cuh", "missing.cuh"], "b.cuh": ["c.cuh"], "c.cuh": ["b.cuh"]}.items():
        (tmp_path / name).write_text("".join(f'#include "{i}"\n' for i in includes) + "#include <vector>\n")
    assert {f.name for f in toolchain.included(tmp_path / "a.cu")} == {"a.cu", "b.cuh", "c.cuh"}
    (tmp_path / "d.cu").write_text('#include "contract/rope.h"\n')  # of csrc, as -I has it
    assert {f.name for f in toolchain.included(tmp_path / "d.cu")} >= {"rope.h", "kernels.h", "dtype.h"}


def test_what_takes_longest_is_compiled_first(toolchain):
    names = [f.stem for f in toolchain.sources()[0]]
    assert {n.split("_")[-1] for n in names[:5]} == {"attention", "int8", "backward", "dbias", "dkv"}
    assert names[-2:] == ["convert", "scale_units"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("Ampere", "TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got 'Ampere' in 'Ampere'"),
        ("8.0 90", "TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got '90' in '8.0 90'"),
        ("7.5", "fastlm's CUDA kernels need compute capability 8.0 or more, got 7.5"),
    ],
)
def test_no_architecture_is_named_with_what_was_asked_for(toolchain, asked, sentence):
    with pytest.raises(toolchain.CannotBuild) as error:
        toolchain.architectures(asked, [])
    assert str(error.value) == sentence


def test_the_compiler_of_cuda_home_comes_first(toolchain, monkeypatch, tmp_path):
    file = _nvcc(tmp_path, "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.nvcc() == file and toolchain.compiler("13.0") == file
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert toolchain.nvcc() is None


def test_without_a_compiler_one_sentence_says_what_to_install(toolchain, monkeypatch):
    monkeypatch.setattr(toolchain, "nvcc", lambda: None)
    with pytest.raises(toolchain.CannotBuild) as error:
        toolchain.compiler("13.0")
    expected = f"nvcc is neither on the PATH nor in $CUDA_HOME: pip install {toolchain.WHEELS}"
    assert str(error.value) == expected


def test_a_compiler_of_another_cuda_is_refused_with_both_versions(toolchain, monkeypatch, tmp_path):
    file = _nvcc(tmp_path, "12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(toolchain.CannotBuild) as error:
        toolchain.compiler("13.0")
    sentence = (
        f"{file} is CUDA 12.4, torch was built with CUDA 13.0: pip install {toolchain.WHEELS} and point"
    )
    assert str(error.value).startswith(sentence)
    assert toolchain.compiler("12.8") == file  # CUDA keeps its interface within a major version


@pytest.mark.parametrize(("memory_gb", "expected"), [(0.5, 1), (3.5, 3), (500, 8)])
def test_jobs_are_bounded_by_processors_and_memory(toolchain, monkeypatch, memory_gb, expected):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(toolchain, "_free_bytes", lambda: int(memory_gb * 2**30))
    assert toolchain.jobs() == expected
    monkeypatch.setenv("MAX_JOBS", "2")
    assert toolchain.jobs() == 2


def _build_record(folder: Path, torch_cuda: str | None) -> dict:
    """What setup.py writes where torch was built with that CUDA, and no compiler is at CUDA_HOME."""
    code = f"""
import runpy, sys, torch
sys.path.insert(0, "csrc")
import toolchain
toolchain.cpu_libraries = lambda *_: None
torch.version.cuda = {torch_cuda!r}
sys.argv = ["setup.py", "-q", "build", "--build-lib", {str(folder)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    environment = os.environ | {"CUDA_HOME": str(folder / "nowhere")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert not list(folder.glob("fastlm/_cuda.*so"))
    return json.loads((folder / "fastlm" / "_build.json").read_text())


def test_a_cpu_build_of_torch_is_no_failure(tmp_path):
    assert _build_record(tmp_path, None)["failed"] == {}


def test_why_nothing_was_built_for_a_cuda_build_of_torch_is_kept(tmp_path):
    reason = _build_record(tmp_path, "13.0")["failed"]["_cuda"]
    assert reason.startswith("nvcc is neither on the PATH nor in $CUDA_HOME: pip install nvidia-cuda-nvcc==")
