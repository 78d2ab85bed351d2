"""From csrc/cuda and bindings to fastlm._cuda: nvcc, architectures. Used by setup.py and the simulator."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import toolchain  # noqa: E402

WHEELS = (
    "nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88"
    " nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
)
GPU_FLAGS = ("-std=c++20", "-O3", "-DFASTLM_GPU")
UNKNOWN_GPU = "8.0 9.0 10.0 12.0+PTX"  # without TORCH_CUDA_ARCH_LIST, where no GPU is seen
_LEAST = 8.0  # compute capability: cp.async, bfloat16 and its mma came with it
_JOB_BYTES = 1 << 30  # 0.6 GB is the most that was measured
_ROOT = Path(__file__).resolve().parent


class CannotBuild(Exception):
    """Its message says in one sentence why fastlm._cuda is not built, and what to do."""


def nvcc() -> Path | None:
    """The CUDA compiler: of $CUDA_HOME, on the PATH, of NVIDIA's wheels here, or in its usual place."""
    if home := os.environ.get("CUDA_HOME"):
        return _existing([Path(home) / "bin" / "nvcc"])
    if found := shutil.which("nvcc"):
        return Path(found)
    wheels = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvcc"))
    return _existing([*wheels, Path("/usr/local/cuda/bin/nvcc")])


def _existing(files: list[Path]) -> Path | None:
    return next((f for f in files if f.exists()), None)


def included(source: Path) -> frozenset[Path]:
    """It, and the files of csrc that it includes, directly or not."""
    found, new = set(), [source.resolve()]
    while new:
        file = new.pop()
        found.add(file)
        names = re.findall(r'(?m)^ *#include "([^"]+)"', file.read_text())
        places = {(folder / name).resolve() for name in names for folder in (file.parent, _ROOT)}
        new += [f for f in places - found if f.exists()]
    return frozenset(found)


def sources() -> tuple[list[Path], list[Path]]:
    """(every .cu, the bindings of those that are ops and of ops made of theirs and torch's matmul).

    Kernels come in the order in which to compile them: those with most text first, as they take longest.
    """
    sizes = {f: sum(i.stat().st_size for i in included(f)) for f in (_ROOT / "cuda").glob("*.cu")}
    kernels = sorted(sizes, key=lambda f: (-sizes[f], f.name))
    names = [name for f in kernels for name in (f.stem, f"{f.stem}_varlen")]
    names += ["feed_forward", "linear_cross_entropy"]
    bindings = [_ROOT / "bindings" / f"{name}.cpp" for name in sorted(names)]
    return kernels, [f for f in bindings if f.exists()]


def architectures(asked: str | None, seen: list[tuple[int, int]]) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", else for the GPUs seen, else the usual.

    Raises: CannotBuild for what is no architecture of 8.0 or more.
    """
    words = re.split(r"[;,\s]+", asked.strip()) if asked else [f"{a}.{b}" for a, b in sorted(set(seen))]
    flags = []
    for word in words or UNKNOWN_GPU.split():
        found = re.fullmatch(r"(\d+)\.(\d)(a|f)?(\+PTX)?", word)
        if not found:
            example = "TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX'"
            raise CannotBuild(f"{example}, got {word!r} in {asked!r}")
        if float(f"{found[1]}.{found[2]}") < _LEAST:
            raise CannotBuild(f"fastlm's CUDA kernels need compute capability {_LEAST} or more, got {word}")
        number = f"{found[1]}{found[2]}{found[3] or ''}"
        codes = f"[sm_{number},compute_{number}]" if found[4] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={codes}")
    return flags


def compiler(torch_cuda: str) -> Path:
    """nvcc, fit for a torch built with CUDA `torch_cuda`. Raises: CannotBuild."""
    found, series = nvcc(), torch_cuda.split(".")[0]
    wheels = f"pip install {WHEELS}" if series == "13" else f"install the CUDA {torch_cuda} toolkit"
    if found is None:
        where = "neither on the PATH nor in $CUDA_HOME"
        raise CannotBuild(f"nvcc is {where}: {wheels}")
    said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or release[1] != series:
        version = f"{release[1]}.{release[2]}" if release else "of unknown version"
        fix = f"{wheels} and point CUDA_HOME at it"
        raise CannotBuild(f"{found} is CUDA {version}, torch was built with CUDA {torch_cuda}: {fix}")
    if shutil.which(toolchain.CXX) is None:
        raise CannotBuild(f"{toolchain.CXX} is not installed: apt-get install g++")
    return found


def jobs() -> int:
    """nvcc's at once: $MAX_JOBS, else one a processor, as far as memory that is free now holds them.

    g++ runs beside them, with what toolchain allows of both together.
    """
    if asked := os.environ.get("MAX_JOBS"):
        return max(1, int(asked))
    return max(1, min(os.cpu_count() or 1, _free_bytes() // _JOB_BYTES))


def _free_bytes() -> int:
    meminfo = Path("/proc/meminfo")  # counts what the page cache would give back
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        return int(found[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _toolkit(compile_cuda: Path) -> Path:
    """The folder of nvcc's headers and libraries, as it says itself: what is on the PATH may be a wrapper."""
    said = subprocess.run(
        [compile_cuda, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", said.stderr + said.stdout, re.M)
    return Path(top[1]).resolve() if top else compile_cuda.resolve().parent.parent


def library(torch_folder: Path, versions: tuple[str, str], codes: list[str], target: Path) -> Path:
    """Builds fastlm._cuda. versions: torch's and its CUDA's; codes: architectures(). Raises: CannotBuild."""
    torch_version, torch_cuda = versions
    compile_cuda = compiler(torch_cuda)
    toolkit, kept = _toolkit(compile_cuda), toolchain.objects_folder(torch_version, compile_cuda, GPU_FLAGS)
    of_codes = kept / "_".join(re.sub(r".*code=", "", c).strip("[]").replace(",", "_") for c in codes)
    as_host = f"{toolchain.binding_flags(torch_folder)} -isystem{toolkit}/include -DFASTLM_GPU -DFASTLM_CUDA"
    as_device = [compile_cuda, *GPU_FLAGS, *codes, "-ccbin", toolchain.CXX]
    as_device += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
    kernels, bindings = sources()
    with ThreadPoolExecutor(jobs()) as pool:
        work = [pool.submit(toolchain.made, [f], of_codes / f"{f.stem}.cu.o", as_device) for f in kernels]
        work.append(pool.submit(toolchain.compiled, bindings, kept / "cuda" / "bindings.o", as_host))
    linked = ["-Wl,-Bsymbolic", f"-L{torch_folder}/lib", "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda"]
    linked += [f"-L{folder}" for folder in _runtime_folders(torch_folder, toolkit)]
    linked += [f"-l:libcudart.so.{torch_cuda.split('.')[0]}"]
    return toolchain.run(["-shared", *(w.result() for w in work), *linked], target)


def _runtime_folders(torch_folder: Path, toolkit: Path) -> list[Path]:
    """Where libcudart.so may be: where torch's own requirements put it, or in nvcc's toolkit."""
    site = torch_folder.parent
    wheels = [*site.glob("nvidia/cu*/lib"), *site.glob("nvidia/cuda_runtime/lib")]
    return [f for f in (*wheels, toolkit / "lib64", toolkit / "lib") if f.exists()]
