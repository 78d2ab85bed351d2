"""One row of the results: all sides of a workload and the machine's ceilings, timed in turn."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from .ceilings import Ceilings, floor
from .clock import CudaClock, clock_of, interleaved
from .workload import Work


@dataclass(frozen=True)
class Row:
    """What is timed. steps: side -> step. work: what a call must do at least. size: for the reader."""

    op: str
    name: str
    size: tuple[int, ...]
    dtype: str
    direction: str
    steps: dict[str, Callable]
    work: Work | None = None


def measured(row: Row, device: str, rounds: int, limit_s: float = math.inf) -> dict:
    """Times the row and returns it as plain values: every round, medians, ratios, shares of the floor."""
    ceilings, clock = Ceilings(device, row.dtype), clock_of(device)
    with torch.inference_mode(row.direction == "forward"):
        times = interleaved(ceilings.steps | row.steps, rounds, clock, limit_s)
    found = row_of(row, {name: times[name] for name in row.steps}, ceilings.rates(times))
    if isinstance(clock, CudaClock):
        for name, step in row.steps.items():
            found["sides"][name]["host_s"] = clock.host_s(step)
    return found


def row_of(row: Row, times: dict[str, list[float]], rates: dict[str, float]) -> dict:
    """The row's results from its times (side -> seconds of each round) and the ceilings' rates."""
    found = {name: getattr(row, name) for name in ("op", "dtype", "direction")}
    found |= {"workload": row.name, "size": list(row.size), "threads": torch.get_num_threads()}
    found["sides"] = {name: summary(seconds) for name, seconds in times.items()}
    found["ceilings"] = rates
    found["work"] = row.work and {"bytes": row.work.bytes, "flops": row.work.flops}
    found["floor"] = floor(row.work, rates)
    baselines = [name for name in times if not is_fastlm(name)]
    ours = [name for name in times if is_fastlm(name)]
    found["best_baseline"] = min(baselines, key=lambda n: median(times[n]), default=None)
    found["ratios"] = {n: {b: ratio(times[b], times[n]) for b in baselines} for n in ours}
    least = found["floor"]
    found["share_of_floor"] = {n: least["seconds"] / median(times[n]) if least else None for n in ours}
    return found


def is_fastlm(side: str) -> bool:
    """Whether a side's name is fastlm's: the others are baselines."""
    return side.split(".")[0] == "fastlm"


def quartiles(values: list[float]) -> list[float]:
    """The first and the third quartile; of one value, that value."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return [first, third]


def summary(seconds: list[float]) -> dict:
    """Median, minimum and quartiles of the rounds, and the rounds."""
    return {
        "median_s": median(seconds),
        "min_s": min(seconds),
        "quartiles_s": quartiles(seconds),
        "rounds_s": seconds,
    }


def ratio(before: list[float], after: list[float]) -> dict:
    """How many times as fast `after` is: by the medians, and the quartiles of the rounds' own ratios."""
    pairs = [b / a for b, a in zip(before, after, strict=True)]
    return {"of_medians": median(before) / median(after), "quartiles": quartiles(pairs)}
