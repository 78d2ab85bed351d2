"""What to compile; the rest is in pyproject.toml. A failed build leaves an install that works by the reference."""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CXX = os.environ.get("CXX", "g++")
COMMON = "-std=c++20 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra".split() + os.environ.get("CXXFLAGS", "").split()
# Not -ffast-math: it switches denormals off in the whole process. The undefined vectors are in GCC's own headers.
KERNEL = "-O3 -fno-math-errno -fno-trapping-math -fno-signed-zeros -ffp-contract=fast -Wno-uninitialized".split()
ISA = {"default": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
ISA["avx512"] = [*ISA["avx2"], *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512".split()]
if platform.machine() not in ("x86_64", "AMD64"):
    ISA = {"default": []}


class BuildNative(build_ext):
    def build_extensions(self):
        record = {"failed": {}}
        try:
            import torch

            record["torch"] = torch.__version__
            self.compile_and_link(Path(torch.__file__).parent)
        except Exception as error:  # no compiler, no torch, out of memory
            lines = (getattr(error, "stdout", None) or f"{error}").strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[-1])[:300]
            record["failed"] = {ext.name.split(".")[1]: reason for ext in self.extensions}
            print(f"fastlm: native kernels were not built: {reason}", file=sys.stderr)
        for root in [self.build_lib] + ["."] * bool(self.inplace or self.editable_mode):
            Path(root, "fastlm").mkdir(parents=True, exist_ok=True)
            Path(root, "fastlm/_build.json").write_text(json.dumps(record))

    def compile_and_link(self, torch):
        """Bindings are compiled once, kernels once per instruction set; each library links both."""
        headers = max(f.stat().st_mtime for f in [Path(__file__), *Path("csrc").rglob("*.h")])

        def compile(source, folder, flags):
            target = Path(self.build_temp, folder, source.stem + ".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.stat().st_mtime < max(headers, source.stat().st_mtime):
                run([CXX, *COMMON, *flags, "-c", source, "-o", target])
            return target

        include = ["-O1", "-isystem", torch / "include", "-isystem", torch / "include/torch/csrc/api/include"]
        kinds = {"bindings": ("bindings", include)} | {isa: ("cpu", KERNEL + ISA[isa]) for isa in ISA}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {k: [pool.submit(compile, f, k, flags) for f in sorted(Path("csrc", folder).glob("*.cpp"))]
                    for k, (folder, flags) in kinds.items()}
        for isa, ext in zip(ISA, self.extensions, strict=True):
            objects = [job.result() for job in jobs["bindings"] + jobs[isa]]
            library = Path(self.get_ext_fullpath(ext.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            run([CXX, "-shared", "-fopenmp", *objects, f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", library])


def run(command):
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


setup(ext_modules=[Extension(f"fastlm._cpu_{isa}", ["csrc/kernels.h"], optional=True) for isa in ISA],
      cmdclass={"build_ext": BuildNative})
