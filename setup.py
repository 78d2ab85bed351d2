"""What to compile; the rest is in pyproject.toml. A failed build leaves the reference."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import cuda_toolchain  # noqa: E402
import toolchain  # noqa: E402


class BuildNative(build_ext):
    """Compiles csrc, and records what for and what went wrong in fastlm/_build.json."""

    def build_extensions(self):
        """Builds every library; a failure is recorded, not raised: the reference needs none of them."""
        self.failed = {}
        record = {"failed": self.failed, "usual_calls": toolchain.missing_python_headers()}
        targets = {
            e.name.removeprefix("fastlm._"): Path(self.get_ext_fullpath(e.name)) for e in self.extensions
        }
        cuda = targets.pop("cuda")
        with self.recorded(*targets):
            import torch

            record["torch"] = torch.__version__
            libraries = {name.removeprefix("cpu_"): target for name, target in targets.items()}
            with ThreadPoolExecutor(1) as beside:  # toolchain bounds the compilers of both together
                gpu = beside.submit(self.build_cuda, cuda) if torch.version.cuda is not None else None
                toolchain.cpu_libraries(Path(torch.__file__).parent, torch.__version__, libraries)
            if gpu is not None:
                gpu.result()  # what it did not record
        self.record = Path(self.build_lib, "fastlm/_build.json")
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(record))

    def build_cuda(self, target: Path):
        """Builds fastlm._cuda for TORCH_CUDA_ARCH_LIST, or else the GPUs that are here."""
        import torch

        with self.recorded("cuda"):
            seen = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
            codes = cuda_toolchain.architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), seen)
            versions = (torch.__version__, torch.version.cuda)
            cuda_toolchain.library(Path(torch.__file__).parent, versions, codes, target)

    @contextmanager
    def recorded(self, *libraries: str):
        """An error inside becomes the reason why these libraries are missing."""
        try:
            yield
        except Exception as error:  # no compiler, no torch, out of memory
            lines = (getattr(error, "stdout", None) or f"{error}").strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[-1] if lines else repr(error))[
                :300
            ]
            self.failed |= {f"_{name}": reason for name in libraries}
            print(f"fastlm: native kernels were not built: {reason}", file=sys.stderr)

    def copy_extensions_to_source(self):
        """What an editable install does with the libraries, and with their record."""
        super().copy_extensions_to_source()
        self.copy_file(str(self.record), "fastlm/_build.json")


setup(
    ext_modules=[
        Extension(f"fastlm._{name}", ["csrc/kernels.h"], optional=True)
        for name in (*(f"cpu_{isa}" for isa in toolchain.ISA_FLAGS), "cuda")
    ],
    cmdclass={"build_ext": BuildNative},
)
