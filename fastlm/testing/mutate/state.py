"""What has been tried: one JSON file, whole at any time, so that a run that was stopped goes on."""

import json
import time
from pathlib import Path

from ...bench.results import write_text

_EVERY = 5.0  # seconds between two writes: a kill loses no more


class State:
    """Records by key. op, arch, kind, kernel, where, line, what, verdict, how, points, seconds."""

    def __init__(self, file: Path):
        self._file, self._written = file, time.monotonic()
        self.records: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}

    def add(self, key: str, record: dict) -> None:
        """Keeps it, soon on disk as well."""
        self.records[key] = record
        if time.monotonic() - self._written > _EVERY:
            self.write()

    def keep_only(self, op: str, arch: str, kind: str, keys: set[str]) -> None:
        """Forgets what is no longer a mutant of this op: its code has changed."""
        self.records = {
            k: r
            for k, r in self.records.items()
            if (r["op"], r["arch"], r["kind"]) != (op, arch, kind) or k in keys
        }
        self.write()

    def write(self) -> None:
        """Under a temporary name first, then renamed."""
        write_json(self._file, self.records)
        self._written = time.monotonic()


def write_json(file: Path, content) -> None:
    """Never half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1) + "\n")
