"""How cost grows: with the sequence, with the vocabulary, and with the number of threads."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import peaks
from .clock import clock_of, interleaved
from .measure import ratio, summary
from .registry import WORKLOADS
from .sides import sides
from .workload import Workload

LIMIT_S = 8.0  # of one point's rounds: the largest sizes get fewer rounds
_SEQUENCES = (256, 512, 1024, 2048, 4096, 8192, 16384)
_VOCABULARIES = (2048, 8192, 32768, 131072)


@dataclass(frozen=True)
class Curve:
    """One workload over growing sizes. of: what grows. at: its value -> the workload's size."""

    op: str
    workload: str
    of: str
    values: tuple[int, ...]
    at: Callable[[int], tuple[int, ...]]
    baseline: str


CURVES = [
    Curve("attention", "gpt2_causal", "sequence length", _SEQUENCES, lambda s: (1, 2, s, 64), "sdpa"),
    Curve("linear_cross_entropy", "gpt2", "vocabulary", _VOCABULARIES, lambda v: (1024, 256, v), "eager"),
]


def curves() -> list[Curve]:
    """The curves whose op is here."""
    return [curve for curve in CURVES if _workload(curve) is not None]


def _workload(curve: Curve) -> Workload | None:
    return next((w for w in WORKLOADS if (w.op, w.name) == (curve.op, curve.workload)), None)


def add_point(found: list[dict], curve: Curve, value: int, device: str, rounds: int) -> None:
    """Measures time and peak memory, forward + backward, at one size, and adds them to `found`."""
    sized = replace(_workload(curve), size=curve.at(value))
    steps = sides(sized, "f32", "both", device, [curve.baseline], [None])
    times = interleaved(steps, rounds, clock_of(device), LIMIT_S)
    point = {"value": value, "size": list(sized.size)}
    point["sides"] = {name: summary(seconds) for name, seconds in times.items()}
    del steps
    if peaks.can_measure(device):
        point["peaks_mb"] = {name: peaks.peak_mb(sized, name, "f32", device) for name in times}
    if not found or found[-1]["op"] != curve.op:
        found.append({"op": curve.op, "of": curve.of, "points": [], "exponents": {}})
    found[-1]["points"].append(point)
    found[-1]["exponents"] = exponents(found[-1]["points"])


def exponents(points: list[dict]) -> dict:
    """Per side the powers with which time and memory grow, fitted to the larger half of the points."""
    half = points[len(points) // 2 :] if len(points) > 3 else points
    found = {}
    for side in points[0]["sides"]:
        found[side] = {"time": exponent([(p["value"], p["sides"][side]["median_s"]) for p in half])}
        if "peaks_mb" in points[0]:
            found[side]["memory"] = exponent([(p["value"], p["peaks_mb"][side]) for p in half])
    return found


def exponent(pairs: list[tuple[float, float]]) -> float | None:
    """b of the least-squares fit y = a * x^b; None where it means nothing."""
    known = [(math.log(x), math.log(y)) for x, y in pairs if y > 0]
    if len(known) < 2:
        return None
    x0, y0 = (sum(values) / len(known) for values in zip(*known, strict=True))
    return sum((x - x0) * (y - y0) for x, y in known) / sum((x - x0) ** 2 for x, _ in known)


def one_per_op() -> list[Workload]:
    """The first workload of each op: on these the number of threads is varied."""
    return list({w.op: w for w in reversed(WORKLOADS)}.values())[::-1]


def threads(workload: Workload, rounds: int) -> dict:
    """fastlm's time on one thread and on all, in turn."""
    most, direction = torch.get_num_threads(), workload.directions[-1]
    step = sides(workload, "f32", direction, "cpu", [], [None])["fastlm"]

    def on(count: int) -> Callable:
        def run() -> None:
            torch.set_num_threads(count)
            step()

        return run

    try:
        with torch.inference_mode(direction == "forward"):
            times = interleaved({"one": on(1), "all": on(most)}, rounds, clock_of("cpu"))
    finally:
        torch.set_num_threads(most)
    found = {"op": workload.op, "workload": workload.name, "size": list(workload.size), "threads": most}
    found["sides"] = {name: summary(seconds) for name, seconds in times.items()}
    return found | {"ratio": ratio(times["one"], times["all"])}
