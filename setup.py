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
            record["usual_calls"] = toolchain.missing_python_headers()
            targets = {e.name.rsplit("_", 1)[1]: Path(self.get_ext_fullpath(e.name)) for e in self.extensions}
            toolchain.cpu_libraries(Path(torch.__file__).parent, torch.__version__, targets)
        except Exception as error:  # no compiler, no torch, out of memory
            lines = (getattr(error, "stdout", None) or f"{error}").strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[-1])[:300]
            record["failed"] = {e.name.split(".")[1]: reason for e in self.extensions}
            print(f"fastlm: native kernels were not built: {reason}", file=sys.stderr)
        self.record = Path(self.build_lib, "fastlm/_build.json")
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(record))

    def copy_extensions_to_source(self):
        """What an editable install does with the libraries, and with their record."""
        super().copy_extensions_to_source()
        self.copy_file(str(self.record), "fastlm/_build.json")


setup(
    ext_modules=[
        Extension(f"fastlm._cpu_{isa}", ["csrc/kernels.h"], optional=True) for isa in toolchain.ISA_FLAGS
    ],
    cmdclass={"build_ext": BuildNative},
)
