"""Peak memory of one call, measured in a child process of its own, with torch's default allocation."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..cli.errors import CommandError
from .sides import sides
from .workload import Workload, bytes_of

# every block of 64 KB or more goes back to the system when it is freed, so that none hides in the peak
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def can_measure(device: str) -> bool:
    """Whether peaks can be read here: on CUDA, and where /proc lets a process reset its own."""
    return torch.device(device).type == "cuda" or _CLEAR.exists()


def peak_mb(workload: Workload, side: str, dtype: str, device: str) -> float:
    """MB (10^6 bytes) that forward and backward need beyond inputs and returned gradients.

    side: a baseline's name, or "fastlm". Raises: CommandError where the child process fails.
    """
    asked = {"op": workload.op, "name": workload.name, "size": workload.size, "side": side}
    asked |= {"dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    child = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(asked)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | _ENVIRONMENT,
    )
    if child.returncode != 0:
        said = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandError(f"the process that measures memory ended with code {child.returncode}: {said}")
    return float(child.stdout.split()[-1])


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_of(step, device: str) -> float:
    """Bytes that one call needs in this process beyond what is there and the gradients that it returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        gradients = sum(bytes_of(g) for g in step()[1:])
        return torch.cuda.max_memory_allocated(device) - before - gradients
    _CLEAR.write_text("5")  # the high-water mark starts anew
    before = _status_bytes("VmRSS")
    gradients = sum(bytes_of(g) for g in step()[1:])
    return _status_bytes("VmHWM") - before - gradients


def _main(request: str) -> None:
    from .registry import WORKLOADS

    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    named = next(w for w in WORKLOADS if (w.op, w.name) == (asked["op"], asked["name"]))
    wanted = ([], [None]) if asked["side"] == "fastlm" else ([asked["side"]], [])

    def step_at(size):
        made = sides(replace(named, size=tuple(size)), asked["dtype"], "both", asked["device"], *wanted)
        return made[asked["side"]]

    step_at(named.small)()  # threads, libraries and workspaces are there before the measurement
    step = step_at(asked["size"])
    step()  # draws the cotangent
    print(peak_of(step, asked["device"]) / 1e6)


if __name__ == "__main__":
    _main(sys.argv[1])
