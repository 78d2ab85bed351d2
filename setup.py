"""What to compile; the rest is in pyproject.toml. A failed build leaves the reference."""

import json
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import toolchain  # noqa: E402


class BuildNative(build_ext):
    """Compiles csrc, and records what for and what went wrong in fastlm/_build.json."""

    def build_extensions(self):
        """Builds every library; a failure is recorded, not raised: the reference needs none of them."""
        record = {"failed": {}}
        try:
            import torch

            record["torch"] = torch.__version__
            targets = {e.name.rsplit("_", 1)[1]: Path(self.get_ext_fullpath(e.name)) for e in self.extensions}
            toolchain.cpu_libraries(Path(torch.__file__).parent, Path(self.build_temp), targets)
        except Exception as error:  # no compiler, no torch, out of memory
            lines = (getattr(error, "stdout", None) or f"{error}").strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[-1])[:300]
            record["failed"] = {e.name.split(".")[1]: reason for e in self.extensions}
            print(f"fastlm: native kernels were not built: {reason}", file=sys.stderr)
        for root in [self.build_lib, "."] if self.inplace or self.editable_mode else [self.build_lib]:
            Path(root, "fastlm").mkdir(parents=True, exist_ok=True)
            Path(root, "fastlm/_build.json").write_text(json.dumps(record))


setup(
    ext_modules=[
        Extension(f"fastlm._cpu_{isa}", ["csrc/kernels.h"], optional=True) for isa in toolchain.ISA_FLAGS
    ],
    cmdclass={"build_ext": BuildNative},
)
