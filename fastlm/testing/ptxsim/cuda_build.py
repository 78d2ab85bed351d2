"""csrc/cuda compiled for the simulator: its PTX, and its launchers with the bindings as one shared library.

Kept under build/cuda_model by the hash of what each file was made from; made when first asked for.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[3]
CSRC = _ROOT / "csrc"
_BUILD = _ROOT / "build" / "cuda_model"
_ENTRY = re.compile(r"(?m)^(?:\.visible |\.weak )?\.entry\s+([$\w]+)")


def missing() -> str | None:
    """Why csrc/cuda cannot be compiled for the simulator here, with what to do; None if it can."""
    if not (CSRC / "cuda").is_dir():
        return "the simulator compiles csrc/cuda: install with 'pip install -e .' from a clone of fastlm"
    if nvcc() is None:
        return f"the simulator needs nvcc to compile csrc/cuda: pip install {_toolchain().WHEELS}"
    if shutil.which(_toolchain().toolchain.CXX) is None:
        return f"the simulator needs {_toolchain().toolchain.CXX} to compile csrc: apt-get install g++"
    return None


@functools.cache
def _toolchain():
    """csrc/cuda_toolchain.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("cuda_toolchain", CSRC / "cuda_toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def nvcc() -> Path | None:
    """The CUDA compiler that the simulator uses."""
    return _toolchain().nvcc()


def sources() -> tuple[list[Path], list[Path]]:
    """(every .cu, the bindings of csrc/cuda's ops)."""
    return _toolchain().sources()


def included(source: Path) -> frozenset[Path]:
    """A file of csrc, and the files of csrc that it includes, directly or not."""
    return _toolchain().included(source)


def _place(name: str, made_from: list[Path | str]) -> Path:
    """build/cuda_model/<name>, with a hash in it of all that it is made from."""
    key = hashlib.sha256(repr((_toolchain().GPU_FLAGS, nvcc(), torch.__version__)).encode())
    for part in made_from:
        if isinstance(part, Path):
            key.update(b"".join(f.read_bytes() for f in sorted(included(part))))
        else:
            key.update(part.encode())
    stem, _, suffix = name.rpartition(".")
    return _BUILD / f"{stem}-{key.hexdigest()[:16]}.{suffix}"


def kept(name: str, made_from: list[Path | str], make: Callable[[Path], None]) -> Path:
    """build/cuda_model/<name>, with a hash in its name of all that it is made from.

    made_from: files of csrc, which count with all that they include, and words. Made by make(where) unless
    it is there.
    """
    target = _place(name, made_from)
    if not target.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_BUILD) as folder:
            made = Path(folder) / name
            try:
                make(made)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"ptxsim: {name} was not built:\n{error.stdout}") from error
            os.replace(made, target)
    return target


def _nvcc(*arguments) -> None:
    command = [nvcc(), *_toolchain().GPU_FLAGS, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def to_ptx(source: Path, arch: str, to: Path, *flags, headers: Path = CSRC) -> None:
    """Compiles a .cu to PTX. headers: the csrc that it includes."""
    _nvcc(f"-arch={arch.replace('sm_', 'compute_')}", *flags, "-I", headers, "-ptx", source, "-o", to)


def ptx(source: Path, arch: str) -> Path:
    """A .cu's PTX for an architecture such as "sm_90a"."""
    return kept(f"{source.stem}.{arch}.ptx", [source], lambda to: to_ptx(source, arch, to))


def cubin(source: Path, arch: str) -> Path:
    """A .cu's machine code for an architecture such as "sm_90", as ptxas makes it from that PTX."""
    return kept(
        f"{source.stem}.{arch}.cubin",
        [source],
        lambda to: _nvcc(f"-arch={arch}", "-cubin", ptx(source, arch), "-o", to),
    )


def release() -> str:
    """nvcc's, such as "13.0.88"."""
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d+\.\d+\.\d+)", said).group(1)


@functools.lru_cache(maxsize=64)
def kernels(source: Path, arch: str) -> dict[str, bytes]:
    """Each kernel of a .cu by its name: PTX of its own, with what it declares of shared memory."""
    return split(ptx(source, arch).read_text())


def split(text: str) -> dict[str, bytes]:
    """The kernels of a .cu's PTX."""
    starts = [*_ENTRY.finditer(text)]
    ends = [m.start() for m in starts[1:]] + [len(text)]
    head, found = text[: starts[0].start()] if starts else "", {}
    for match, end in zip(starts, ends, strict=True):
        body = text[match.start() : end]
        lines = (line for line in head.splitlines() if ".shared" not in line or _declared(line) in body)
        found[match.group(1)] = ("\n".join(lines) + "\n" + body).encode()
    return found


def _declared(line: str) -> str:
    return re.search(r"([$\w]+)(?:\[\d*\])?\s*;", line).group(1)


def library(cuda: list[Path], bindings: list[Path]) -> Path:
    """One shared library: these launchers and bindings, the stand-in CUDA runtime, the noting allocator."""
    torch_folder = Path(torch.__file__).parent
    include = _toolchain().toolchain.binding_flags(torch_folder)
    simulated = sorted((CSRC / "simulated").glob("*.cpp"))

    def host(source: Path) -> Path:
        def make(to: Path) -> None:
            code = ["-gencode", "arch=compute_80,code=compute_80", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            _nvcc(*code, "-I", CSRC, "--keep", "--keep-dir", to.parent, "-c", source, "-o", to)
            # what ptx() would compile once more, in 7 s
            os.replace(to.parent / f"{source.stem}.ptx", _place(f"{source.stem}.sm_80.ptx", [source]))

        return kept(f"{source.stem}.cu.o", [source], make)

    def bound(name: str, files: list[Path]) -> Path:
        flags = [*include.split(), "-DFASTLM_GPU", "-DFASTLM_SIMULATED"]
        flags += _toolchain().toolchain.together(files)
        return kept(f"{name}.cpp.o", files, lambda to: _toolchain().toolchain.run(flags, to))

    def link(to: Path) -> None:
        linked = ["-shared", "-Wl,-Bsymbolic", *objects, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
        _toolchain().toolchain.run(linked, to)

    with _alone(), ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(host, f) for f in cuda]
        jobs += [pool.submit(bound, "bindings", bindings), pool.submit(bound, "simulated", simulated)]
        objects = [job.result() for job in jobs]
        return kept("model.so", [f.name for f in objects], link)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Of several processes one builds, the others wait for it."""
    _BUILD.mkdir(parents=True, exist_ok=True)
    with open(_BUILD / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
