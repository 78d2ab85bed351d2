"""What `fastlm tune` found fastest on this machine's GPU: on disk, and from there into the Triton kernels.

One file per GPU, release of Triton and of fastlm, in the user's cache folder. It is loaded when a Triton
kernel is first used on a GPU; nothing is ever tuned unasked. A file that cannot be trusted is ignored whole.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # not on Windows: there two that tune at once may lose one's findings, never the file
    fcntl = None

_SCHEMA = 1
Key = tuple  # (config function's name, arch, *sizes), as in fastlm_triton._config.TUNED


def folder() -> Path:
    """Where the files are: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm" / "tuned"


def file_of(gpu: str) -> Path:
    """The file of a GPU, by its name, for the Triton and fastlm that run now."""
    made_for = _header(gpu)
    name = f"{gpu}-triton-{made_for['triton']}-fastlm-{made_for['fastlm']}".lower()
    return folder() / f"{re.sub('[^a-z0-9.]+', '-', name)}.json"


def read(gpu: str) -> tuple[dict, str | None]:
    """({key: Config} of a GPU, None), or ({}, why its file is ignored); a file that is not there is empty."""
    file = file_of(gpu)
    try:
        return _entries(json.loads(file.read_text(encoding="utf-8")), _header(gpu)), None
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return {}, f"{file} cannot be read: {error.strerror or error}"
    except _Foreign as error:
        return {}, f"{file} {error}; run fastlm tune again"
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, f"{file} is damaged; run fastlm tune again"


def merge(gpu: str, found: dict) -> Path:
    """Puts {key: Config, or None to forget it} into the GPU's file, beside what others put there; its path.

    Raises: OSError where it cannot be written; then the old file stays.
    """
    file = file_of(gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        known = read(gpu)[0] | found
        entries = [_entry(key, config) for key, config in known.items() if config is not None]
        _write(file, json.dumps(_header(gpu) | {"configs": entries}, indent=1) + "\n")
    return file


def forget(gpu: str) -> bool:
    """Removes the GPU's file. Returns: whether there was one."""
    file = file_of(gpu)
    there = file.exists()
    file.unlink(missing_ok=True)
    return there


@functools.cache
def load(index: int) -> None:
    """Into the Triton kernels, what was tuned on the GPU of this index; once in a process."""
    found, _ = read(torch.cuda.get_device_name(index))
    tuned = import_module("fastlm_triton._config").TUNED
    for key, config in found.items():
        tuned.setdefault(key, config)


def dropped(error: Exception) -> bool:
    """Whether a launch failed for a tuned configuration's size, and was the last: all are forgotten then.

    A configuration is tuned on one call; with other options the kernel may need more memory than there is.
    """
    tuned = import_module("fastlm_triton._config").TUNED
    if type(error).__name__ != "OutOfResources" or not tuned:
        return False
    tuned.clear()
    return True


def state() -> dict | None:
    """{"file", "configurations", "ignored"} of the first GPU; None where there is no GPU or no Triton."""
    if not torch.cuda.is_available() or find_spec("triton") is None or find_spec("fastlm_triton") is None:
        return None
    gpu = torch.cuda.get_device_name(0)
    found, ignored = read(gpu)
    return {"file": str(file_of(gpu)), "configurations": len(found), "ignored": ignored}


class _Foreign(Exception):
    """The file was made for something else."""


def _header(gpu: str) -> dict:
    from . import __version__

    names = {"gpu": gpu, "triton": version("triton"), "fastlm": __version__}
    return {"schema": _SCHEMA} | names | {"kernels": _kernels_digest()}


@functools.cache
def _kernels_digest() -> str:
    """Of the kernels' sources: where they change between releases, what was tuned may not fit them."""
    home = Path(find_spec("fastlm_triton").submodule_search_locations[0])
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(home.glob("*.py")))).hexdigest()[:16]


def _entries(content: dict, header: dict) -> dict:
    for name, running in header.items():
        found = content[name]
        if found != running:
            raise _Foreign(f"was made for {name} {found}, here is {running}")
    make = import_module("fastlm_triton._config").Config
    entries = {}
    for entry in content["configs"]:
        key = (entry["function"], entry["arch"], *map(_decoded, entry["sizes"]))
        numbers = (*entry["block"], entry["warps"], entry["stages"])
        if not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(numbers)
        entries[key] = make(tuple(entry["block"]), entry["warps"], entry["stages"])
    return entries


def _entry(key: Key, config) -> dict:
    function, arch, *sizes = key
    told = {"function": function, "arch": arch, "sizes": [_encoded(size) for size in sizes]}
    return told | {"block": list(config.block), "warps": config.warps, "stages": config.stages}


def _encoded(size):
    if isinstance(size, torch.dtype):
        return {"dtype": str(size).removeprefix("torch.")}
    if isinstance(size, tuple):
        return {"tuple": [_encoded(s) for s in size]}
    if size is None or isinstance(size, bool | int | float | str):
        return size
    raise TypeError(f"a size of type {type(size).__name__} cannot be kept")


def _decoded(size):
    if not isinstance(size, dict):
        return size
    return getattr(torch, size["dtype"]) if "dtype" in size else tuple(map(_decoded, size["tuple"]))


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time."""
    with open(file.with_suffix(".lock"), "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(file: Path, text: str) -> None:
    named = {"dir": file.parent, "prefix": ".tuned-", "delete": False, "encoding": "utf-8"}
    opened = tempfile.NamedTemporaryFile("w", **named)
    try:
        with opened:
            opened.write(text)
        os.replace(opened.name, file)
    finally:
        Path(opened.name).unlink(missing_ok=True)
