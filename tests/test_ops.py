"""Every op on every backend in every case: values and gradients by the 2x rule, and the kernel really ran."""

from contextlib import nullcontext

import pytest
import torch

import fastlm
from fastlm import ops
from fastlm._op import OPS
from fastlm.testing import ptxsim
from fastlm.testing.cases import SEEDS, Draw, cases_of
from fastlm.testing.compare import KernelCalls, device_of, moved, verdicts

ARCHS = ("sm_80", "sm_90a", "sm_120")  # that GPU kernels are simulated for, where there is no GPU


def _is_often(backend, arch, number, case, dtype):
    """What make test simulates: every case on sm_80, its dtypes in turn; on others an op's first, of Triton.

    nvcc takes 7 s to compile an op for another architecture.
    """
    if arch == "sm_80":
        return dtype == case.dtypes[number % len(case.dtypes)]
    return backend == "triton" and number == 0 and dtype == torch.bfloat16


def _points():
    for name, op in OPS.items():
        for backend in op.backends:
            for number, case in enumerate(cases_of(name, backend)[0]):
                for dtype in case.dtypes:
                    short = str(dtype).removeprefix("torch.")
                    simulated = backend in ("cuda", "triton") and device_of(backend) == "cpu"
                    for arch in ARCHS if simulated else (None,):
                        at = f"{backend}-{arch}" if arch else backend
                        often = arch is None or _is_often(backend, arch, number, case, dtype)
                        marks = () if often else (pytest.mark.gpu_model,)
                        id = f"{name}-{at}-{case.name}-{short}"
                        yield pytest.param(name, backend, arch, case, dtype, id=id, marks=marks)


def _is_small(case, dtype):
    """Of few numbers the reference may be right by luck; of many a simulated launch takes up to a second.

    On a GPU it is the reference in float64, and the CPU that judges, that take the time.
    """
    given = case.inputs(Draw(0, dtype)).values()
    return sum(t.numel() for t in given if isinstance(t, torch.Tensor)) < 2000


@pytest.mark.parametrize(("name", "backend", "arch", "case", "dtype"), list(_points()))
def test_kernel_is_as_right_as_the_reference(name, backend, arch, case, dtype):
    few = backend in ("cuda", "triton") and not _is_small(case, dtype)
    seeds = SEEDS[:2] if few else SEEDS
    with ptxsim.device(arch) if arch else nullcontext():
        _check(name, backend, case, dtype, seeds)


def _check(name, backend, case, dtype, seeds):
    public, differentiable = getattr(ops, name), cases_of(name)[1]
    draws = [moved(case.inputs(Draw(seed, dtype)), device_of(backend)) for seed in seeds]
    refusal = fastlm.explain(name, **draws[0]).reasons[backend]
    if refusal is not None:
        with pytest.raises(NotImplementedError) as error:
            public(**draws[0], backend=backend)
        assert str(error.value) == refusal
        return
    with KernelCalls() as calls:
        found = verdicts(public, draws, differentiable, backend)
    assert calls.names.count(f"{name}.{backend}") == len(seeds)
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))
    declared = OPS[name]
    if any(v.name.startswith("gradient") for v in found) and declared.backward:
        assert max(declared.units) >= 0 or calls.names.count(f"{name}_backward.{backend}") == len(seeds)


@pytest.mark.parametrize("name", OPS)
def test_no_case_is_refused_by_the_cpu_without_a_reason_in_its_limits(name):
    for case in cases_of(name)[0]:
        reason = fastlm.explain(name, **case.inputs(Draw(0, torch.float32))).reasons["cpu"]
        assert reason is None or OPS[name].backends["cpu"] is not None, reason
