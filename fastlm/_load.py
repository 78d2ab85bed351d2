"""Loads the native libraries, and remembers in one sentence why one is missing."""

import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from . import _cuda_kernels, _triton

REINSTALL = "reinstall with 'pip install --no-build-isolation -e .'"

_FOLDER = Path(__file__).parent
_ISA = {"AVX512": "avx512", "AVX2": "avx2"}


def _build() -> dict:
    """What setup.py wrote about its build: torch version, and per library the reason of a failure."""
    file = _FOLDER / "_build.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _release(version: str) -> str:
    """2.13 of 2.13.0+cpu: torch keeps its C++ interface within such a release."""
    return ".".join(re.split(r"[.+]", version)[:2])


def _load(library: str, build: dict) -> str | None:
    """Loads fastlm.<library>; returns None, or why it could not."""
    if library in build.get("failed", {}):
        return f"fastlm.{library} was not built: {build['failed'][library]}; {REINSTALL}"
    files = sorted(_FOLDER.glob(f"{library}.*"))
    if not files:
        return f"fastlm.{library} was not built; {REINSTALL}"
    built_for = build.get("torch", "an unknown version")
    if _release(built_for) != _release(torch.__version__):
        return f"rebuild: fastlm.{library} was built for torch {built_for}, running {torch.__version__}"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"fastlm.{library} does not load ({str(error).splitlines()[0]}); {REINSTALL}"
    return None


def _load_all() -> dict[str, str | None]:
    isa = _ISA.get(torch.backends.cpu.get_cpu_capability(), "default")
    return {
        "cpu": _load(f"_cpu_{isa}", _build()),
        "cuda": _cuda_kernels.without_cuda() or _load("_cuda", _build()),
        "triton": _triton.missing(),
    }


def _usual_calls() -> ModuleType | None:
    """The builtins that run usual calls, in the loaded library; None where it was built without them.

    setup.py then wrote the reason to _build.json, as "usual_calls".
    """
    try:
        return import_module(f"._cpu_{ISA}", __package__)
    except ImportError:  # no Python.h at the build, or another Python's library
        return None


ISA: str = _ISA.get(torch.backends.cpu.get_cpu_capability(), "default")
MISSING: dict[str, str | None] = _load_all()  # backend -> None if it is loaded, else the reason
AUTOGRAD = MISSING["cpu"] is None  # the kernels' autograd node is in the same library
USUAL = _usual_calls() if MISSING["cpu"] is None else None
