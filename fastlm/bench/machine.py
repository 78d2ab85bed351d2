"""Facts about the machine that figures mean nothing without."""

import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastlm

from .. import _load


def facts(device: str) -> dict:
    """Device, instruction set, threads, versions, and the time in UTC; plain values. Of a GPU its own too."""
    found = {
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
    return found | _gpu_facts(device) if torch.device(device).type == "cuda" else found


def _gpu_facts(device: str) -> dict:
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv"]
    return {
        "gpu": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mb": properties.total_memory // 10**6,
            "l2_mb": properties.L2_cache_size / 1e6,
            "nvidia_smi": _said(query),  # all GPUs: driver, clock and power limit
        },
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in ("triton", "flash-attn", "liger-kernel")},
    }


def summary(machine: dict) -> str:
    """The machine in one line, under a picture or above a table."""
    if "gpu" in machine:
        gpu, triton = machine["gpu"], machine["packages"]["triton"]
        return f"{gpu['name']}, CUDA {machine['cuda']}, triton {triton}, torch {machine['torch']}"
    where = f"{machine['cpu']}, {machine['instruction_set']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    return (_said(["g++", "--version"]) or [None])[0]


def _said(command: list[str]) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
