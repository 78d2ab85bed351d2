"""The CPU that the kernels run on: its instruction set, its threads, and its memory used again.

Most of a large memory-bound operation's time on a CPU is page faults: the system clears every page of a fresh
output (a fresh 32 MB costs about 10 ms). After reuse_memory() the memory of tensors that are gone serves the
next ones.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from . import _load

_LIBRARY = torch.library.Library("fastlm", "FRAGMENT")
for _schema in ("reuse_memory(int limit) -> ()", "trim() -> int", "memory_statistics() -> int[]"):
    _LIBRARY.define(f"cpu_{_schema}")
_OPS = torch.ops.fastlm
_SHARE = 4  # a quarter of the memory may lie idle
_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

_reusing = False


class MemoryStatistics(NamedTuple):
    """What reuse_memory() did in this process so far.

    on: whether it was called. limit: bytes that may lie idle. idle: bytes kept for the next tensors. in_use:
    bytes of large tensors that are alive (those made since). hits: large tensors that got memory used before.
    misses: those that got fresh memory of the system.
    """

    on: bool
    limit: int
    idle: int
    in_use: int
    hits: int
    misses: int


def instruction_set() -> str:
    """What the loaded kernels were compiled for: "default", "avx2" or "avx512"."""
    return _load.ISA


def threads() -> int:
    """How many threads the kernels use: torch.get_num_threads()."""
    return torch.get_num_threads()


def reuse_memory(limit: int | None = None) -> None:
    """Makes torch, in this whole process, keep the memory of freed CPU tensors for the next ones.

    It cannot be undone. Tensors of 256 KB and more are served so, rounded up by at most an eighth; smaller
    ones are allocated as before. Tensors made before stay as they are. Every thread takes part; a forked
    child starts with nothing idle. Called again, it changes the limit.

    limit: bytes that may lie idle; above it, what was idle the longest goes back to the system. 0 keeps
        nothing. None: a quarter of the memory that this process may have.
    Raises: TypeError or ValueError for a bad limit, RuntimeError where the native library is missing or
        another library replaced torch's allocator; then nothing has changed.
    """
    global _reusing
    most = _memory()
    if limit is None:
        limit = most // _SHARE
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"reuse_memory: limit must be a number of bytes or None, got {limit!r}")
    if not 0 <= limit <= most:
        raise ValueError(f"reuse_memory: limit must be 0 to {most} bytes (the memory here), got {limit}")
    if _load.MISSING["cpu"] is not None:
        raise RuntimeError(f"reuse_memory: {_load.MISSING['cpu']}")
    _OPS.cpu_reuse_memory(limit)
    _reusing = True


def trim() -> int:
    """Gives all idle memory back to the system.

    Returns: how many bytes that were; 0 where reuse_memory() was never called.
    """
    return _OPS.cpu_trim() if _reusing else 0


def memory_statistics() -> MemoryStatistics:
    """What reuse_memory() did in this process so far: all 0 where it was never called."""
    return MemoryStatistics(_reusing, *(_OPS.cpu_memory_statistics() if _reusing else [0] * 5))


def _memory() -> int:
    """The bytes of memory that this process may have: the machine's, or its container's."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = [Path(file).read_text().strip() for file in _LIMIT_FILES if Path(file).exists()]
    return min([most, *(int(a) for a in allowed if a.isdigit())])
