"""What a run has measured so far, on disk after every job: nothing is lost if the process is."""

from pathlib import Path

from ..cli.errors import CommandError
from . import results


class Journal:
    """The results so far of a run that will write `file`, in <file>.part; without a file nothing is kept.

    Beside a results file's content it has "running", the title of the job under way.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.part = None if file is None else file.with_name(f"{file.name}.part")

    def begun(self, found: dict, resume: bool) -> dict:
        """`found`, or what an earlier run left if it is to be resumed and was asked for the same.

        An earlier run left <file>.part if it was ended; the job in which it ended counts as failed: it may
        have ended the process. Else it left `file`, from which what it had no time for goes on.
        """
        fresh = found | {"done": []}
        if not resume or self.part is None:
            return fresh
        file = self.part if self.part.exists() else self.file
        old = results.read(file) if file.exists() else fresh
        if "done" not in old:
            return fresh  # there is none, or it is from before files said what was done
        if _asked(old["options"]) != _asked(found["options"]):
            told = f"{file} was begun with other options; remove it, or repeat them"
            raise CommandError(f"--resume: {told}")
        if "running" in old:
            note(old, old.pop("running"), None, "the process ended in it")
        old.pop("left_out", None)
        return old

    def save(self, found: dict) -> None:
        """Writes the results so far, whole or not at all."""
        if self.part is not None:
            results.write(self.part, found)

    def remove(self) -> None:
        """Once the results are in their own file."""
        if self.part is not None:
            self.part.unlink(missing_ok=True)


def note(found: dict, title: str, side: str | None, reason: str) -> None:
    """Adds a failure: of one side of a job, or of a whole one; it counts as done."""
    found.setdefault("failures", []).append({"title": title, "side": side, "reason": reason})
    if side is None:
        found["done"].append(title)


def _asked(options: dict) -> dict:
    """What must be the same for a run to go on with another's results."""
    return {name: value for name, value in options.items() if name not in ("limit_s", "resume")}
