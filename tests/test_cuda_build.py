"""fastlm._cuda as it was built: loaded, registered, traced on fake CUDA tensors: make test-cuda-build.

Where torch is a CPU build there is nothing to look at: these tests are skipped.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import check_forward, check_raw_backward

import fastlm
from fastlm import _load
from fastlm._op import OPS

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
LIBRARY = next(iter(Path(fastlm.__file__).parent.glob("_cuda.*.so")), None)

# The patched demo model compiled on fake CUDA tensors, in a process of its own: what is compiled, and what of
# it are our kernels. Its backward is a graph of raw backward ops, which check_raw_backward runs: autograd's
# engine answers "hasPrimaryContext expects a valid device index" where there is no GPU, for fake tensors too.
TRACED = """
import json, torch, fastlm
from torch._subclasses.fake_tensor import FakeTensorMode
from fastlm.examples.plain_gpt import PlainGPT

def fake(t):
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
    return made.requires_grad_(t.requires_grad)

def call(tensors, tokens):
    return torch.func.functional_call(model, tensors, (tokens,))

def capture(graph, inputs):
    seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
    return graph.forward

model, seen = PlainGPT(101, 64, 2, 2, 48, 0.1), []
fastlm.patch(model)
with FakeTensorMode():
    tensors = {n: fake(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    tokens = torch.empty(3, 48, dtype=torch.int64, device="cuda")
    out = torch.compile(call, backend=capture, fullgraph=True)(tensors, tokens)
    torch._dynamo.reset()
    with torch.no_grad():
        other = torch.compile(call, backend="aot_eager", fullgraph=True)(tensors, tokens)
print(json.dumps([str(out.device), list(out.shape), list(other.shape), [n for n in seen if "fastlm." in n]]))
"""


def test_it_is_built_and_loaded():
    assert _load.MISSING["cuda"] is None
    record = json.loads((Path(fastlm.__file__).parent / "_build.json").read_text())
    assert record["failed"] == {} and record["torch"] == torch.__version__


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_its_kernels(name):
    for declared in (OPS[name].forward, OPS[name].backward):
        if declared:
            raw = str(declared["cuda"]._schema).split("(")[0]
            assert torch._C._dispatch_has_kernel_for_dispatch_key(raw, "CUDA"), raw


@pytest.mark.parametrize("name", OPS)
def test_fake_cuda_tensors_run_forward(name):
    check_forward(name, "cuda", chosen=False)


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].backward])
def test_fake_cuda_tensors_run_the_raw_backward(name):
    check_raw_backward(name, "cuda")


def test_the_patched_demo_model_is_compiled_whole(tmp_path):
    # elsewhere: -c imports from the folder that it is run in before what is installed
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    device, shape, other, kernels = json.loads(done.stdout.splitlines()[-1])
    assert device == "cuda:0" and shape == other == [3, 48, 101]
    for name in ("layer_norm", "attention", "feed_forward"):
        assert any(re.fullmatch(rf"fastlm\.{name}\.(cuda|triton)", k) for k in kernels), (name, kernels)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_it_needs_torchs_libraries_and_the_cuda_runtime_alone():
    said = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", said))
    known = r"lib(c10(_cuda)?|torch_(cpu|cuda)|cudart|stdc\+\+|m|gcc_s|gomp|c|pthread)\.so.*|ld-linux.*"
    assert {n for n in needed if not re.fullmatch(known, n)} == set()
    assert "PATH" not in said  # nothing of the machine that built it
