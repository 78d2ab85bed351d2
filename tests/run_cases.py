"""Runs every CPU kernel on every case, forward and backward: what `make sanitize` watches."""

import torch

import fastlm
from fastlm import cpu, ops
from fastlm._op import OPS
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import KernelCalls, leaves, run


def main() -> None:
    """Prints how many kernels ran; a sanitizer ends the process at its first finding."""
    with KernelCalls() as calls:
        for name in OPS:
            cases, differentiable = cases_of(name)
            for case, dtype in ((c, d) for c in cases for d in c.dtypes):
                inputs = leaves(case.inputs(Draw(0, dtype)), differentiable)
                if fastlm.explain(name, **inputs).reasons["cpu"] is None:
                    run(getattr(ops, name), inputs, [], backend="cpu")
    kernels = [f"{n}.cpu" for n in OPS] + [f"{n}_backward.cpu" for n in OPS if OPS[n].backward]
    _public_calls()
    _reuse_memory()
    missed = [k for k in kernels if k not in calls.names]
    assert not missed, missed
    print(f"{len(calls.names)} kernels ran on {torch.get_num_threads()} threads, and no sanitizer spoke")


def _public_calls() -> None:
    """Every case once more without a mode that watches: usual calls run in their builtins then."""
    for name in OPS:
        for case, dtype in ((c, d) for c in cases_of(name)[0] for d in c.dtypes):
            getattr(ops, name)(**case.inputs(Draw(0, dtype)))


def _reuse_memory() -> None:
    """Last, since sanitizers do not watch the inside of memory that is used again."""
    before = torch.ones(1 << 20)
    cpu.reuse_memory(8 << 20)
    for n in range(1 << 17, 1 << 21, 1 << 16):
        before = before.sum() + torch.ones(n)
    del before
    assert cpu.memory_statistics().idle == cpu.trim() > 0


if __name__ == "__main__":
    main()
