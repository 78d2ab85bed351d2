"""What the GPU kernels move, counted on the simulator: the bars of docs/evidence.md, and its table.

    python -m fastlm.testing.memory_bars [--docs docs/evidence.md]

The least that a kernel can move is each tensor of its schema once: inputs read, outputs written. A tensor
below a sixteenth of the largest (a weight, statistics) is counted once however often it is read: it stays in
the L2 cache. Sectors and wavefronts: ptxsim/profile.py.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import ops
from .._explain import raw_arguments
from .._op import OPS, _as_tuple
from . import ptxsim
from .memory_workloads import WORKLOADS, Workload
from .pages import table_command
from .ptxsim.profile import SECTOR, Profile, Traffic

_SMALL = 16  # a tensor this much smaller than the largest stays in the L2 cache


class Movement(NamedTuple):
    """Of one raw op: bytes moved and the least; sectors and wavefronts over ideal; launches.

    instructions: of each kernel, of all its threads.
    """

    moved: int
    least: int
    sectors: float
    wavefronts: float
    launches: int
    instructions: dict[str, int]

    @property
    def ratio(self) -> float:
        """Bytes over the least."""
        return self.moved / self.least


def measure(
    workload: Workload,
    arch: str = "sm_80",
    backend: str = "triton",
    also: Callable[[Callable[[], object]], None] = lambda call: None,
) -> tuple[Movement, Movement | None]:
    """Runs the raw op, and its backward if it has one, on the simulator; returns what each moved.

    also: called with each of the two calls, before it runs.
    """
    op = OPS[workload.op]
    arguments, _ = raw_arguments(workload.op, **workload.arguments())
    profile, outputs = _simulated(functools.partial(op.forward[backend], *arguments), arch, also)
    named = dict(zip(op.arguments, arguments, strict=True)) | dict(zip(op.outputs, outputs, strict=False))
    written = [named[n] for n in op.written] or [t for t in outputs if t is not None]
    read = [t for n, t in zip(op.arguments, arguments, strict=True) if n not in op.written]
    forward = _movement(profile, read, written)
    if not workload.backward:
        return forward, None
    raw = op.backward[backend]
    named |= {f"d{o}": torch.randn_like(named[o]) for o in op.outputs[: op.public] if named[o].numel()}
    named["needs"] = [isinstance(named[op.arguments[a]], Tensor) for a in op.wanted]
    given = [named.get(a.name) for a in raw._schema.arguments]
    profile, gradients = _simulated(functools.partial(raw, *given), arch, also)
    read = [t for a, t in zip(raw._schema.arguments, given, strict=True) if a.name not in workload.unread]
    return forward, _movement(profile, read, gradients)


def _simulated(call: Callable[[], object], arch: str, also: Callable) -> tuple[Profile, tuple]:
    """(what the call's launches did, its outputs)."""
    profile = Profile()
    with torch.no_grad():
        also(call)
        with ptxsim.device(arch, profile):
            return profile, _as_tuple(call())


def _bytes(tensors) -> int:
    known = {t.data_ptr(): t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)}
    return sum(known.values())


def _movement(profile: Profile, read, written) -> Movement:
    traffic = profile.memory_traffic.values()
    largest = max(t.unique for t in traffic)
    moved = sum(t.unique if t.unique * _SMALL <= largest else SECTOR * t.sectors for t in traffic)
    return Movement(
        moved,
        _bytes(read) + _bytes(written),
        _over_ideal(traffic),
        _over_ideal(profile.shared_traffic.values()),
        len(profile.launches),
        dict(profile.instructions),
    )


def _over_ideal(traffic) -> float:
    total = Traffic(sum(t.sectors for t in traffic), sum(t.ideal for t in traffic))
    return total.ratio


class _Bytes(TorchDispatchMode):
    """Counts what every torch op that computes reads and writes: tensors once each."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        made = [t for t in outputs if isinstance(t, Tensor)]
        inputs = [
            t for a in args for t in (a if isinstance(a, (tuple, list)) else (a,)) if isinstance(t, Tensor)
        ]
        views = {t.untyped_storage().data_ptr() for t in inputs}
        writes = func._schema.is_mutable or any(t.untyped_storage().data_ptr() not in views for t in made)
        if writes and "empty" not in str(func):
            self.total += _bytes(inputs) + _bytes(made)
        return result


def eager_bytes(workload: Workload) -> int:
    """What the same call moves as a graph of torch's own ops, forward and backward together."""
    given = {
        n: v.requires_grad_(workload.backward) if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in workload.arguments().items()
    }
    with _Bytes() as counted:
        y = workload.eager(**given)
        if workload.backward:
            inputs = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
            torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)
    return counted.total


class Reads(NamedTuple):
    """Bytes of keys and values: what attention's forward read, what its tiles ask for, each of them once."""

    read: int
    tiled: int
    once: int
    wavefronts: float


def attention_reads(arch: str = "sm_80", causal: bool = True, backend: str = "triton") -> Reads:
    """Of attention over [1, 4, 512, 64] in bfloat16: a tile of queries reads the tiles of keys it sees."""
    seq, dim = 512, 64
    q, k, v = (torch.randn(1, 4, seq, dim, dtype=torch.bfloat16) for _ in range(3))
    profile = Profile()
    with ptxsim.device(arch, profile), torch.no_grad():
        ops.attention(q, k, v, causal=causal, backend=backend)
    ((_, grid, _),) = profile.launches
    queries = 4 * seq // math.prod(grid)
    tiles = range(0, seq, queries)
    seen = sum(min(start + queries, seq) if causal else seq for start in tiles)  # whole tiles of keys
    names = ("k", "v") if backend == "triton" else ("argument 1", "argument 2")
    read = sum(t.sectors for (_, _, name), t in profile.memory_traffic.items() if name in names)
    row = 2 * 4 * dim * 2  # keys and values, heads, bytes
    return Reads(SECTOR * read, seen * row, seq * row, _over_ideal(profile.shared_traffic.values()))


def matrix_kernels(arch: str = "sm_80", backend: str = "triton") -> dict[str, tuple[float, float]]:
    """(sectors, wavefronts) over ideal of each kernel with a matrix product, at sizes of several tiles."""
    profile = Profile()
    q, k, v = (torch.randn(1, 2, 256, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    x, w1, w2 = (
        torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()
        for shape in ((128, 128), (256, 128), (128, 256))
    )
    with ptxsim.device(arch, profile):
        ops.attention(q, k, v, causal=True, backend=backend).sum().backward()
        if backend == "triton":  # of csrc/cuda they are torch's
            ops.feed_forward(x, w1, None, w2, None, backend=backend).sum().backward()
    shares: dict[str, list] = {}
    for (kernel, _, _), traffic in profile.memory_traffic.items():
        shares.setdefault(kernel, []).append(traffic)
    return {
        kernel: (_over_ideal(traffic), profile.shared_traffic[kernel].ratio)
        for kernel, traffic in shares.items()
    }


def table(arch: str = "sm_80") -> str:
    """All of it, as a page shows it."""
    head = ("op", "forward", "backward", "launches", "sectors", "wavefronts", "torch's own ops")
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for workload in WORKLOADS:
        both = [m for m in measure(workload, arch) if m]
        cells = [f"{m.ratio:.2f}" for m in both] + ["–"] * (2 - len(both))
        cells.append(" + ".join(str(m.launches) for m in both))
        cells += [f"{max(m.sectors for m in both):.2f}", f"{max(m.wavefronts for m in both):.2f}"]
        cells.append(f"{eager_bytes(workload) / sum(m.least for m in both):.1f}")
        lines.append(f"| {workload.title} | {' | '.join(cells)} |")
    lines += ["", "| attention [1, 4, 512, 64], forward | K and V read | by its tiles | wavefronts |"]
    lines.append("| --- | --- | --- | --- |")
    for causal in (True, False):
        found = attention_reads(arch, causal)
        times = f"{found.read / found.once:.2f} times | {found.tiled / found.once:.2f} times"
        lines.append(f"| {'causal' if causal else 'plain'} | {times} | {found.wavefronts:.2f} |")
    lines += ["", "| kernel | sectors | wavefronts |", "| --- | --- | --- |"]
    lines += [f"| {k} | {s:.2f} | {w:.2f} |" for k, (s, w) in matrix_kernels(arch).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    table_command("memory_bars", "memory", table)
