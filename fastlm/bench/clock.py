"""Timing: every side in turn, round after round, so that what disturbs the machine disturbs all alike."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch

_CYCLES_PER_S = 2e9  # at least a GPU's clock: a wait counted in cycles lasts as long as asked, or longer


class CpuClock:
    """Wall-clock seconds; short calls are repeated within one sample."""

    sample_s, most_calls = 0.02, 10000  # a shorter call is repeated until a sample lasts that long

    def seconds(self, step: Callable, calls: int) -> float:
        """Seconds of one call, the mean of `calls` in a row."""
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """Seconds between CUDA events; before each call the second-level cache is overwritten.

    The device then waits for as long as the host needs to prepare the call, so that it runs without gaps:
    what the host needs is not in the seconds, and host_s has it.
    """

    sample_s, most_calls = 0.005, 200

    def __init__(self, device: str, cuda=torch.cuda):
        self._cuda = cuda
        cache = cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * cache, 1), dtype=torch.int8, device=device)
        self._hosts: dict[Callable, float] = {}

    def seconds(self, step: Callable, calls: int) -> float:
        """Seconds of one call on the device, the mean of `calls`."""
        wait = int(1.5 * self.host_s(step) * _CYCLES_PER_S)
        event = partial(self._cuda.Event, enable_timing=True)
        events = [(event(), event()) for _ in range(calls)]
        for start, end in events:
            self._flush.zero_()
            self._cuda._sleep(wait)
            start.record()
            step()
            end.record()
        self._cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls

    def host_s(self, step: Callable) -> float:
        """Seconds that the host needs to start one call, the least of three after one to warm up."""
        if step not in self._hosts:
            seconds = []
            for _ in range(4):
                self._cuda.synchronize()
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            self._cuda.synchronize()
            self._hosts[step] = min(seconds[1:])
        return self._hosts[step]


def clock_of(device: str) -> CpuClock | CudaClock:
    """The clock for a device."""
    return CudaClock(device) if torch.device(device).type == "cuda" else CpuClock()


def interleaved(
    steps: dict[str, Callable], rounds: int, clock, limit_s: float = math.inf, sample_s: float | None = None
) -> dict[str, list[float]]:
    """Seconds per call of every step, `rounds` of each after two calls to warm up.

    In a round each step comes once; the order rotates by one from round to round. No new round begins when
    limit_s seconds have passed, but one is always measured. Short calls are repeated within a sample until it
    lasts sample_s, by default the clock's own.
    """
    sample_s = sample_s or clock.sample_s
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
    return min(clock.most_calls, max(1, math.ceil(sample_s / once)))
