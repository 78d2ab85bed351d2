"""The workloads of `fastlm bench`, one benchmark per side, through pytest-benchmark.

It times one side after the other; `fastlm bench` takes them in turn, which is fairer on a shared machine.
Run: pytest benchmarks/ -k rms_norm
"""

import pytest
import torch

from fastlm.bench.registry import WORKLOADS
from fastlm.bench.sides import sides

BACKENDS = ("cpu",)


def _points(direction):
    for workload in WORKLOADS:
        names = [*workload.baselines, *(["compile"] if "eager" in workload.baselines else []), *BACKENDS]
        for dtype in workload.dtypes if direction in workload.directions else ():
            for side in names:
                name = f"{workload.op}-{workload.name}-{side}-{dtype}"
                yield pytest.param(workload, side, dtype, id=name)


def _step(workload, side, dtype, direction):
    wanted = ([], [side]) if side in BACKENDS else ([side], [])
    return next(iter(sides(workload, dtype, direction, "cpu", *wanted).values()))


@pytest.mark.parametrize("workload, side, dtype", [*_points("forward")])
def bench_forward(benchmark, workload, side, dtype):
    with torch.inference_mode():
        benchmark(_step(workload, side, dtype, "forward"))


@pytest.mark.parametrize("workload, side, dtype", [*_points("both")])
def bench_forward_backward(benchmark, workload, side, dtype):
    benchmark(_step(workload, side, dtype, "both"))
