"""What fastlm.cpu.reuse_memory() does here, measured in a process of its own: it cannot be undone."""

import json
import statistics
import subprocess
import sys
import time
from functools import cache

import torch

from .. import cpu

_ROUNDS = 7
_NUMBERS = 8 << 20  # 32 MB of float32


@cache
def gain() -> dict:
    """Milliseconds of torch.relu on 32 MB as torch allocates, and with memory used again.

    Returns: "relu_32_mb_ms" ("default", "reused"), "statistics" (fastlm.cpu.memory_statistics), "trimmed"
    (bytes); or "failed", the reason in one line.
    """
    command = [sys.executable, "-m", "fastlm.cli.doctor_memory"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout)


def measure() -> dict:
    """What `gain` returns, measured in this process, which reuses memory from then on."""
    x = torch.ones(_NUMBERS)
    default = _relu_ms(x)
    cpu.reuse_memory()
    reused = _relu_ms(x)
    return {
        "relu_32_mb_ms": {"default": default, "reused": reused},
        "statistics": cpu.memory_statistics()._asdict(),
        "trimmed": cpu.trim(),
    }


def _relu_ms(x: torch.Tensor) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        torch.relu(x)
        seconds.append(time.perf_counter() - start)
    return round(statistics.median(seconds) * 1e3, 2)


if __name__ == "__main__":
    print(json.dumps(measure()))
