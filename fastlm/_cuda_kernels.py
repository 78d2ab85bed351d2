"""The CUDA C++ kernels: the library fastlm._cuda on GPUs; in a simulated device, on CPU tensors, csrc/cuda
compiled and executed by fastlm.testing.ptxsim.
"""

from collections.abc import Callable

import torch

from . import _triton


def without_cuda() -> str | None:
    """Why this torch can run no CUDA kernel; None if it can."""
    if torch.version.cuda is not None:
        return None
    kind = "a ROCm" if torch.version.hip else "a CPU"
    fix = "install a CUDA build of torch, see https://pytorch.org/get-started/locally, then reinstall fastlm"
    return f"torch {torch.__version__} is {kind} build, fastlm._cuda needs a CUDA one: {fix}"


def simulation_missing() -> str | None:
    """Why csrc/cuda cannot be compiled for the simulator, with what to do; None if it can."""
    from .testing.ptxsim import cuda_build

    return cuda_build.missing()


simulation_missing._dynamo_marked_constant = True  # as in _triton.py


def simulated_body(name: str) -> Callable:
    """The raw op fastlm::<name>.cuda on CPU tensors."""

    def run(*args):
        if _triton.simulator.arch is None:
            where = "on CPU tensors it runs inside fastlm.testing.ptxsim.device()"
            raise NotImplementedError(f"{name}.cuda takes cuda tensors; {where}")
        from .testing.ptxsim import cuda

        return cuda.call(name, args)

    return run
