"""Drawn cases: sizes, options, layouts and wanted gradients that nobody thought of, on every backend.

They may be twice as far off as the 2x rule allows: a case of few numbers is among them, or one where the
reference is right by luck, and what is wrong is wrong by much more.
"""

from contextlib import nullcontext
from functools import partial
from itertools import cycle, islice

import pytest
import torch
from test_ops import ARCHS

import fastlm
from fastlm import ops
from fastlm._op import OPS
from fastlm.testing import ptxsim
from fastlm.testing.cases import DTYPES, SEEDS, Draw
from fastlm.testing.cases.drawn import cotangents, drawn
from fastlm.testing.compare import device_of, moved, verdicts

OFTEN, OF_THE_CPU, ALL = (
    2,
    12,
    24,
)  # how many cases of an op: make test's on a GPU's backend, on the CPU, in all


def _points():
    for name, op in OPS.items():
        for backend in op.backends:
            simulated = backend in ("cuda", "triton") and device_of(backend) == "cpu"
            archs = cycle(ARCHS if simulated else (None,))
            for number, arch in enumerate(islice(archs, ALL if simulated else OF_THE_CPU)):
                dtype = DTYPES[(number + number // 3) % 3]
                often = not simulated or (number < OFTEN * len(ARCHS) and arch == "sm_80")
                id = f"{name}-{backend}-{arch}-{number}" if arch else f"{name}-{backend}-{number}"
                marks = () if often else (pytest.mark.gpu_model,)
                yield pytest.param(name, backend, arch, number, dtype, id=id, marks=marks)


@pytest.mark.parametrize(("name", "backend", "arch", "number", "dtype"), list(_points()))
def test_kernel_is_right_in_a_case_that_was_drawn(name, backend, arch, number, dtype):
    case, wanted = drawn(name, number)
    seeds = SEEDS[:3] if arch else SEEDS
    draws = [moved(case.inputs(Draw(seed, dtype)), device_of(backend)) for seed in seeds]
    with ptxsim.device(arch) if arch else nullcontext():
        refusal = fastlm.explain(name, **draws[0]).reasons[backend]
        if refusal is not None:
            with pytest.raises(NotImplementedError) as error:
                getattr(ops, name)(**draws[0], backend=backend)
            assert str(error.value) == refusal
            return
        found = verdicts(getattr(ops, name), draws, wanted, backend, partial(cotangents, name, number))
    assert all(v.ratio <= 2 for v in found), "\n".join(map(str, found))


def test_a_number_is_the_same_case_everywhere():
    first, again = (drawn("attention", 7)[0].inputs(Draw(0, torch.float32)) for _ in range(2))
    assert first.keys() == again.keys() and torch.equal(first["q"], again["q"])
    assert {str(drawn("attention", n)[1]) for n in range(20)} > {str(("q", "k", "v", "bias"))}
