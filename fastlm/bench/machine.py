"""Facts about the machine that figures mean nothing without."""

import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastlm

from .. import _load


def facts(device: str) -> dict:
    """Device, instruction set, threads, versions, and the time in UTC; plain values."""
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "instruction_set": _load.ISA,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastlm": fastlm.__version__,
        "g++": _compiler(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """Short, fit for a file's name: cpu-avx512, or the GPU's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return f"cpu-{_load.ISA}"


def cpu_name() -> str:
    """What the system calls its processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _compiler() -> str | None:
    if shutil.which("g++") is None:
        return None
    said = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    return said.splitlines()[0] if said else None
