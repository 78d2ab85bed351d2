"""Results on disk: one JSON file, read back with its mistakes told in one line."""

import json
import os
import tempfile
from pathlib import Path

from ..cli.errors import CommandError

SCHEMA = 1
_OF_A_ROW = (
    "op",
    "workload",
    "size",
    "dtype",
    "direction",
    "memory",
    "threads",
    "sides",
    "ratios",
    "ceilings",
)


def empty(machine: dict, options: dict) -> dict:
    """A file's content before anything was measured."""
    return {"schema": SCHEMA, "machine": machine, "options": options, "rows": []}


def key(row: dict) -> tuple:
    """What makes two rows the same measurement."""
    return (row["op"], row["workload"], tuple(row["size"]), row["dtype"], row["direction"], row["memory"])


def title(row: dict) -> str:
    """Such as "layer_norm gpt2 [4096,768] bf16 forward"; float32 and both directions are not told."""
    told = [row["op"], row["workload"]] + [f"[{','.join(map(str, row['size']))}]"] * bool(row["size"])
    told += [row["dtype"]] * (row["dtype"] != "f32") + ["forward"] * (row["direction"] == "forward")
    return " ".join(told)


def write(file: Path, found: dict) -> None:
    """Writes the results. Raises: CommandError where they cannot be written; then the old file stays."""
    write_text(file, json.dumps(rounded(found), indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes under a temporary name beside the file and renames: never half a file. Raises: CommandError."""
    temporary = None
    try:
        with _temporary(file.parent) as opened:
            temporary = Path(opened.name)
            opened.write(text)
        temporary.chmod(0o644)
        os.replace(temporary, file)
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Makes the folder if need be. Raises: CommandError where no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder) as opened:
            os.unlink(opened.name)
    except OSError as error:
        raise CommandError(f"cannot write into {folder}: {error.strerror or error}") from error


def _temporary(folder: Path):
    return tempfile.NamedTemporaryFile("w", dir=folder, prefix=".bench-", delete=False, encoding="utf-8")


def rounded(value):
    """Five digits are more than a timing has; all that is shown is made of what the file holds."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def read(file: Path) -> dict:
    """The content of a results file. Raises: CommandError where it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise CommandError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise CommandError(f"{file} is not a result of fastlm bench with schema {SCHEMA}")
    for row in found["rows"]:
        missing = [name for name in _OF_A_ROW if name not in row]
        if missing:
            raise CommandError(f"{file} has a row without {', '.join(missing)}")
    return found
