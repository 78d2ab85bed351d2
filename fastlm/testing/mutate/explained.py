"""Why a change survives: each reason names the changes that it is for, and no survivor goes without one."""

import re
from typing import NamedTuple


class Reason(NamedTuple):
    """Changes by patterns that match from the start: kernel's name, text of the source line, what changed."""

    kernel: str
    line: str
    what: str
    reason: str


REASONS: list[Reason] = []


def reason_for(record: dict) -> str | None:
    """Why a mutant survives, or None if nobody has said."""
    for r in REASONS:
        patterns = ((r.kernel, "kernel"), (r.line, "line"), (r.what, "what"))
        if all(re.match(pattern, record[key]) for pattern, key in patterns):
            return r.reason
    return None
