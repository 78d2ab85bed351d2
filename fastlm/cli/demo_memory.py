"""Peak memory of training one model, measured in a child process that does nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from .demo_model import Size, make_model, make_optimizer, train_step
from .errors import CommandError

STEPS = 3  # the optimiser's state is made in the first step, so the second already holds everything
_CHILD = f"a process that trains this model for {STEPS} steps and does nothing else"
MEASURED = f"the peak resident memory (VmHWM) of {_CHILD}, Python and torch included"
MEASURED_CUDA = f"the peak of what torch allocated on the device in {_CHILD}"


def peak_mb(side: str, size: Size, device: torch.device) -> float:
    """Peak memory in MB (10^6 bytes) of training `side` ("baseline" or "fastlm"). Raises: CommandError."""
    request = json.dumps({"side": side, "size": vars(size), "device": str(device)})
    child = subprocess.run(
        [sys.executable, "-m", __name__, request], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if child.returncode != 0:
        said = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandError(f"the process that measures memory ended with code {child.returncode}: {said}")
    return float(child.stdout.split()[-1])


def _own_peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")  # on Linux getrusage's maximum still counts the parent's memory
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def _main(request: str) -> None:
    asked = json.loads(request)
    size, device = Size(**asked["size"]), torch.device(asked["device"])
    model = make_model(size, device)
    if asked["side"] == "fastlm":
        import fastlm

        fastlm.patch(model)
    optimizer = make_optimizer(model)
    tokens = torch.randint(size.vocab, (size.batch, size.context), device=device)
    for _ in range(STEPS):
        train_step(model, optimizer, tokens, tokens)
    print(_own_peak_mb(device))


if __name__ == "__main__":
    _main(sys.argv[1])
