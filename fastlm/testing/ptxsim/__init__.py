"""ptxsim: executes on CPU tensors the PTX that Triton (or nvcc) made, and finds what a GPU would not forgive.

    with fastlm.testing.ptxsim.device("sm_80"):
        fastlm.ops.layer_norm(x, backend="triton")

parse.py reads the text; compile.py turns basic blocks into Python, with every form it knows in forms.py and
arithmetic.py; machine.py runs all threads in lock step, in the order of flow.py; matrix.py and
tensor_cores.py do the matrix forms; memory.py checks every access, profile.py counts them, order.py tells
programs apart by what orders them; driver.py is Triton's driver; cuda.py runs csrc/cuda's own launchers,
which cuda_build.py compiles. docs/evidence.md says what this can show and what it cannot.
"""

from .driver import ARCHS, device, run
from .errors import SimulationError, UnknownInstruction

__all__ = ["ARCHS", "SimulationError", "UnknownInstruction", "device", "run"]
