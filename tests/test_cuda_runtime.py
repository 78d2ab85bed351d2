"""The stand-in CUDA runtime: launches as launchers make them, errors as CUDA gives them, every finding."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm import ops
from fastlm._explain import raw_arguments
from fastlm._op import OPS
from fastlm.testing import ptxsim
from fastlm.testing.ptxsim import cuda, cuda_build

PROBE = Path(__file__).parent / "native" / "cuda_probe.cu"
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9  # cudaError_t


@pytest.fixture(scope="module")
def probe():
    made = cuda.Runtime(cuda_build.library([PROBE], []), [PROBE])
    made.library.probe.restype = ctypes.c_char_p
    made.library.probe.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64),
        *(ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p),
    )
    raw = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    made.library.probe_without_opt_in.argtypes = raw
    return made


def exchanged(probe, n=64, blocks=1, threads=64, shared=256, arch="sm_80", size=64):
    """(y, what the launcher threw)."""
    x, y = torch.arange(float(size)), torch.full((64,), -1.0)

    def call(x, y):
        return probe.library.probe(x.data_ptr(), n, y.data_ptr(), blocks, threads, shared, 5).decode()

    with ptxsim.device(arch):
        return y, probe.call(call, x, y)


def without_opt_in(probe, threads, shared):
    x, y = torch.arange(64.0), torch.full((64,), -1.0)

    def call(x, y):
        return probe.library.probe_without_opt_in(x.data_ptr(), 64, y.data_ptr(), threads, shared)

    with ptxsim.device("sm_80"):
        return y, probe.call(call, x, y)


def without_barriers(name, text):
    return re.sub(rb"bar\.sync\s+0;", b"", text)


def test_a_launch_runs_with_its_grid_its_memory_and_its_stream(probe):
    y, message = exchanged(probe)
    assert (y.tolist(), message) == ([float(i ^ 33) for i in range(64)], "")
    (launch,) = probe.launches
    assert "exchange_kernel" in launch.kernel
    assert launch[1:] == ((1, 1, 1), (64, 1, 1), 256, 5)


def test_triple_brackets_launch_too(probe):
    y, error = without_opt_in(probe, 64, 256)
    assert (y.tolist(), error) == ([float(i ^ 33) for i in range(64)], 0)


@pytest.mark.parametrize("threads", [0, 1025, 2048])
def test_a_block_of_too_many_threads_or_none_raises_naming_op_and_cause(probe, threads):
    y, message = exchanged(probe, threads=threads)
    words = f"exchange: a launch of 1 blocks of {threads} threads with 256 bytes of shared memory failed: "
    assert message == words + "invalid configuration argument"
    assert (y == -1).all()
    assert not probe.launches


def test_a_grid_of_too_many_blocks_raises_and_none_does_nothing(probe):
    assert exchanged(probe, blocks=1 << 31)[1].endswith("failed: a grid has at most 2147483647 blocks")
    y, message = exchanged(probe, blocks=0)
    assert ((y == -1).all(), message, probe.launches) == (True, "", [])


@pytest.mark.parametrize("kilobytes", [48, 49, 163])
def test_a_launcher_opts_in_to_as_much_shared_memory_as_a_block_may_have(probe, kilobytes):
    y, message = exchanged(probe, shared=kilobytes << 10)
    assert (y[0], message) == (33, "")


@pytest.mark.parametrize(("arch", "most"), [("sm_80", 163), ("sm_90a", 227), ("sm_120", 99)])
def test_more_shared_memory_than_the_gpu_has_raises(probe, arch, most):
    assert exchanged(probe, shared=most << 10, arch=arch)[1] == ""
    message = exchanged(probe, shared=(most << 10) + 1, arch=arch)[1]
    assert message.startswith("exchange: ") and message.endswith("failed: invalid argument")


def test_more_than_48_kilobytes_without_opt_in_are_refused(probe):
    assert without_opt_in(probe, 64, 48 << 10)[1] == 0
    assert without_opt_in(probe, 64, (48 << 10) + 4)[1] == INVALID_VALUE
    assert without_opt_in(probe, 1025, 256)[1] == INVALID_CONFIGURATION


def test_an_access_outside_every_tensor_of_the_call_is_found(probe):
    with pytest.raises(ptxsim.SimulationError, match="bounds.*in no tensor of this launch.*ld.global"):
        exchanged(probe, size=63)


def test_an_access_outside_the_shared_memory_of_the_launch_is_found(probe):
    with pytest.raises(ptxsim.SimulationError, match="bounds.*of 252 bytes"):
        exchanged(probe, shared=252)


def test_a_missing_syncthreads_is_found(probe):
    with ptxsim.device("sm_80", rewrite=without_barriers):
        x, y = torch.arange(64.0), torch.zeros(64)

        def call(x, y):
            return probe.library.probe(x.data_ptr(), 64, y.data_ptr(), 1, 64, 256, None)

        with pytest.raises(ptxsim.SimulationError, match="poison|race"):
            probe.call(call, x, y)


@pytest.mark.parametrize("name", ["softmax", "layer_norm"])
def test_a_missing_syncthreads_in_an_op_is_found(name):
    x = torch.randn(2, 1000)  # a block a row
    with ptxsim.device("sm_80", rewrite=without_barriers):
        with pytest.raises(ptxsim.SimulationError, match="poison|race"):
            getattr(ops, name)(x, backend="cuda")


def test_what_a_kernel_does_not_write_is_nan():
    def without_stores(name, text):
        return re.sub(rb"(?m)^.*st\.global\.[^;]*;", b"", text)

    x = torch.randn(3, 8)
    with ptxsim.device("sm_80", rewrite=without_stores):
        assert ops.softmax(x, backend="cuda").isnan().all()


def test_an_op_may_write_no_tensor_of_another_call():
    foreign = torch.zeros(8)  # its address instead of y's: nobody passed it
    x = torch.randn(1, 8)

    def elsewhere(name, text):
        return re.sub(rb"(?m)^(\s*st\.global\S*\s*)\[%rd\d+[^\]]*\]", rb"\1[%d]" % foreign.data_ptr(), text)

    with ptxsim.device("sm_80", rewrite=elsewhere):
        with pytest.raises(ptxsim.SimulationError, match="bounds"):
            ops.softmax(x, backend="cuda")
    assert (foreign == 0).all()


def test_ops_launch_on_the_current_stream():
    with ptxsim.device("sm_80"):
        ops.layer_norm(torch.randn(3, 8), backend="cuda")
    launches = cuda.runtime().launches
    assert len(launches) == 3  # weight and bias are filled first
    assert {launch.stream for launch in launches} == {0x57}


@pytest.mark.parametrize("name", ["layer_norm", "softmax"])
def test_tracers_see_the_raw_op(name):
    """opcheck, and torch.compile(fullgraph=True) with its gradient."""
    x = torch.randn(3, 40)
    with ptxsim.device("sm_80"):
        arguments, _ = raw_arguments(name, x)
        torch.library.opcheck(OPS[name].forward["cuda"], arguments)

        def call(x):
            return getattr(ops, name)(x, backend="cuda")

        found = []
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            found += [y, *torch.autograd.grad(y.square().sum(), leaf)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_outside_a_simulated_device_one_sentence_says_what_is_missing():
    x = torch.randn(3, 8)
    reason = fastlm.explain("softmax", x).reasons["cuda"]
    if torch.version.cuda is None:
        assert re.match(r"torch \S+ is a CPU build, .*: install a CUDA build of torch", reason)
    with pytest.raises(NotImplementedError, match="takes cuda tensors; on CPU tensors .*ptxsim.device"):
        torch.ops.fastlm.softmax.cuda(x, 1.0, None, False)


def test_without_nvcc_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    with ptxsim.device("sm_80"), pytest.raises(NotImplementedError) as error:
        ops.softmax(torch.randn(3, 8), backend="cuda")
    sentence = f"the simulator needs nvcc to compile csrc/cuda: pip install {cuda_build._toolchain().WHEELS}"
    assert str(error.value) == sentence


def test_who_names_no_backend_gets_triton_and_compiles_nothing():
    code = """
import sys, torch, fastlm
with fastlm.testing.ptxsim.device("sm_80"):
    print(fastlm.explain("softmax", torch.ones(2, 8)).chosen)
    fastlm.ops.softmax(torch.ones(2, 8))
print("fastlm.testing.ptxsim.cuda" in sys.modules)
"""
    code = code.replace("import sys, torch, fastlm", "import sys, torch, fastlm, fastlm.testing.ptxsim")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["triton", "False"], done.stderr
