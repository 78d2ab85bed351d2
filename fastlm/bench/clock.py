"""Timing: every side in turn, round after round, so that what disturbs the machine disturbs all alike."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch

SAMPLE_S = 0.02  # a shorter call is repeated until a sample lasts that long
_MOST_CALLS = 10000


class CpuClock:
    """Wall-clock seconds; short calls are repeated within one sample."""

    def seconds(self, step: Callable, calls: int) -> float:
        """Seconds of one call, the mean of `calls` in a row."""
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """Seconds between CUDA events; before each call the second-level cache is overwritten."""

    def __init__(self, device: str):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * cache, 1), dtype=torch.int8, device=device)

    def seconds(self, step: Callable, calls: int) -> float:
        """Seconds of one call, the mean of `calls`; the flush and the host's work before it do not count."""
        event = partial(torch.cuda.Event, enable_timing=True)
        events = [(event(), event()) for _ in range(calls)]
        for start, end in events:
            self._flush.zero_()  # also keeps the device busy while the host prepares the call
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls


def clock_of(device: str) -> CpuClock | CudaClock:
    """The clock for a device."""
    return CudaClock(device) if torch.device(device).type == "cuda" else CpuClock()


def interleaved(
    steps: dict[str, Callable], rounds: int, clock, limit_s: float = math.inf, sample_s: float = SAMPLE_S
) -> dict[str, list[float]]:
    """Seconds per call of every step, `rounds` of each after two calls to warm up.

    In a round each step comes once; the order rotates by one from round to round. No new round begins when
    limit_s seconds have passed, but one is always measured. Short calls are repeated within a sample until it
    lasts sample_s.
    """
    calls = {name: _calls(step, clock, sample_s) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, begin = list(steps), time.perf_counter()
    for turn in range(rounds):
        if turn and time.perf_counter() - begin > limit_s:
            break
        for name in order:
            times[name].append(clock.seconds(steps[name], calls[name]))
        order.append(order.pop(0))
    return times


def _calls(step: Callable, clock, sample_s: float) -> int:
    """Warms up, and says how many calls make a sample of sample_s."""
    step()
    once = max(clock.seconds(step, 1), 1e-7)
    if once > sample_s / 10:
        return max(1, math.ceil(sample_s / once))
    once = max(clock.seconds(step, 10), 1e-7)  # a single short call is mostly waking up
    return min(_MOST_CALLS, max(1, math.ceil(sample_s / once)))
