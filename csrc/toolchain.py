"""From csrc to shared libraries: compiler, flags, what is out of date. Used by setup.py and by tests."""

import hashlib
import os
import platform
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CXX = os.environ.get("CXX", "g++")
COMMON = "-std=c++20 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra"
# Not -ffast-math: it switches denormals off in the whole process. -Wno-uninitialized: GCC 12's own headers.
KERNEL = "-O3 -fno-math-errno -fno-trapping-math -fno-signed-zeros -ffp-contract=fast -Wno-uninitialized"
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
ISA_FLAGS = {"default": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": _AVX2, "avx512": _AVX512}
if _ONLY := os.environ.get("FASTLM_ONLY_ISA"):  # a build for this machine alone, as make sanitize's
    ISA_FLAGS = {_ONLY: ISA_FLAGS[_ONLY]}

# Compilers at once, of several libraries together.
_TURNS = threading.Semaphore(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
_CXXFLAGS = os.environ.get("CXXFLAGS", "")
_ROOT = Path(__file__).resolve().parent


def run(arguments: list, target: Path, folder: Path | None = None) -> Path:
    """Compiles or links, in `folder`, to `target`; CalledProcessError has the compiler's words in stdout."""
    return _make([CXX, *COMMON.split(), *arguments, *_CXXFLAGS.split()], target, folder)


def _make(command: list, target: Path, folder: Path | None) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with _TURNS:
        subprocess.run([*command, "-o", target], check=True, cwd=folder, **said)
    return target


def together(sources: list[Path]) -> list:
    """Arguments that compile several sources as one, so that what they include is read once.

    torch's headers cost 9 s a file: the 14 bindings of csrc/cuda take 15 s so, one by one 151 s.
    """
    included = [word for f in sources for word in ("-include", f)]
    return ["-c", *sources] if len(sources) == 1 else ["-c", *included, "-x", "c++", os.devnull]


def compiled(sources: list[Path], target: Path, flags: str) -> Path:
    """The object of sources together, made anew where it is older than what it was made from."""
    return made(sources, target, [CXX, *COMMON.split(), *flags.split(), *_CXXFLAGS.split()])


def made(sources: list[Path], target: Path, compiler: list) -> Path:
    """As compiled, by a whole command of g++'s or nvcc's; all paths in what it lists are of this folder."""
    if _up_to_date(sources, target):
        return target
    named = together([f.relative_to(_ROOT) for f in sources])
    return _make([*compiler, "-MMD", "-MF", target.with_suffix(".d"), *named], target, _ROOT)


def _up_to_date(sources: list[Path], target: Path) -> bool:
    """Whether an object was made from these, and is younger than all that the compiler listed."""
    listed = target.with_suffix(".d")
    if not target.exists() or not listed.exists():
        return False
    files = [_ROOT / word for word in listed.read_text().split(": ", 1)[1].replace("\\\n", " ").split()]
    made_at = target.stat().st_mtime
    young = all(f.exists() and f.stat().st_mtime <= made_at for f in (Path(__file__), *files))
    return young and {*sources} <= {*files}


def objects_folder(torch_version: str, *more) -> Path:
    """Where objects of this compiler, these flags and this torch are kept, whoever builds."""
    key = repr((CXX, COMMON, KERNEL, _CXXFLAGS, torch_version, *more)).encode()
    return _ROOT.parent / "build" / "objects" / hashlib.sha256(key).hexdigest()[:12]


def binding_flags(torch_folder: Path) -> str:
    """How what includes torch is compiled: optimizing more would double what its headers cost."""
    return f"-O1 -isystem{torch_folder}/include -isystem{torch_folder}/include/torch/csrc/api/include"


def missing_python_headers() -> str | None:
    """Why usual_*.cpp, which speak to Python itself, cannot be compiled here; None if they can."""
    folder = Path(sysconfig.get_paths()["include"])
    return None if (folder / "Python.h").exists() else f"{folder}/Python.h is missing"


def cpu_libraries(torch_folder: Path, torch_version: str, targets: dict[str, Path]) -> None:
    """Builds one library per instruction set: targets maps a name of ISA_FLAGS to the library's path.

    Bindings are compiled once, kernels once per instruction set.
    """
    objects = objects_folder(torch_version)
    include, linked_to = binding_flags(torch_folder), ["-lc10", "-ltorch_cpu"]
    bindings = sorted((_ROOT / "bindings").glob("*.cpp"))
    calls = [f for f in bindings if f.stem.startswith("usual_")]
    work = [("bindings", "all", include, [f for f in bindings if f not in calls])]
    if missing_python_headers() is None:  # without them every call takes its longer way, through Python
        python = f"{include} -isystem{sysconfig.get_paths()['include']}"
        work.append((f"calls_{sys.implementation.cache_tag}", "all", python, calls))
        linked_to.append("-ltorch_python")
    for isa in targets:
        flags = f"{KERNEL} {ISA_FLAGS[isa]}"
        work += [(isa, f.stem, flags, [f]) for f in sorted((_ROOT / "cpu").glob("*.cpp"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compiled, files, objects / kind / f"{name}.o", flags)
            for kind, name, flags, files in work
        ]
    objects_made = [(kind, job.result()) for (kind, *_), job in zip(work, jobs, strict=True)]
    for isa, target in targets.items():
        linked = [made_object for kind, made_object in objects_made if kind == isa or kind not in ISA_FLAGS]
        run(["-shared", *linked, f"-L{torch_folder}/lib", *linked_to], target)
