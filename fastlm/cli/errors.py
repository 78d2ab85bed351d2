"""What a command ends with: one line on stderr and an exit code, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """A command cannot go on; its message is the one line that the user reads."""


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turns CommandError (exit code 1) and Ctrl-C (130) inside the `with` into one line on stderr."""
    try:
        yield
    except CommandError as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    else:
        return
    print(f"fastlm {command}: {message}", file=sys.stderr)
    raise SystemExit(code)
