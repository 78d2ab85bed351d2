"""Changes of a kernel's PTX: each barrier, commit, wait and fence is deleted or weakened.

Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/, chapter 9.7.
"""

import functools
import hashlib
import re
from collections import Counter
from typing import NamedTuple

_SITE = re.compile(
    r"(?<![\w.%$])(bar\.sync|barrier\.sync(?:\.aligned)?|bar\.warp\.sync|cp\.async\.commit_group|"
    r"cp\.async\.wait_group|cp\.async\.wait_all|wgmma\.fence\.sync\.aligned|wgmma\.commit_group\.sync\.aligned|"
    r"wgmma\.wait_group\.sync\.aligned|fence\.proxy\.async(?:[.:]+\w+)*)\b([^;]*);"
)
_FILE = re.compile(r'(?m)^\s*\.file\s+(\d+)\s+"(?:[^"\n]*/)?([^/"\n]+)"')
_LOC = re.compile(r"(?m)^\s*\.loc\s+(\d+)\s+(\d+)[^\n]*?(?:inlined_at\s+(\d+)\s+(\d+)[^\n]*)?$")


class Site(NamedTuple):
    """One statement of a kernel that orders threads or copies.

    start, end: where it stands in the text. opcode, rest: "bar.sync" and " 0". source: "_norms.py:104".
    """

    start: int
    end: int
    opcode: str
    rest: str
    source: str


class Change(NamedTuple):
    """what: in words. text: what stands there instead."""

    what: str
    text: str


def sites(text: str, ours: frozenset[str] | None = None) -> list[Site]:
    """All of a kernel's; ours: the files whose lines are named (None: any)."""
    code = _code(text)
    files = dict(_FILE.findall(text))
    lines = [(m.start(), where) for m in _LOC.finditer(code) if (where := _where(m, files, ours))]
    found, at = [], 0
    for match in _SITE.finditer(code):
        while at < len(lines) and lines[at][0] < match.start():
            at += 1
        rest = " ".join(match.group(2).split())
        source = lines[at - 1][1] if at else ""
        found.append(Site(match.start(), match.end(), match.group(1), f" {rest}" * bool(rest), source))
    return found


def _where(match: re.Match, files: dict, ours: frozenset[str] | None) -> str:
    """The line that a .loc names, or the one that it was inlined at: the one in one of our files."""
    for file, line in ((match.group(1), match.group(2)), (match.group(3), match.group(4))):
        name = files.get(file)
        if name and line != "0" and (ours is None or name in ours):
            return f"{name}:{line}"
    return ""


def keyed(found: list[Site]) -> dict[tuple, Site]:
    """Sites by (line of source, statement, number among those alike): variants of a kernel share most."""
    before, keys = Counter(), {}
    for site in found:
        alike = (site.source, site.opcode + site.rest)
        keys[(*alike, before[alike])] = site
        before[alike] += 1
    return keys


def changes(site: Site) -> list[Change]:
    """Every change of a site."""
    told = site.opcode + site.rest
    made = [(f"{told} deleted", "")]
    if site.opcode.startswith(("bar.sync", "barrier.sync")):
        made.append((f"{told} -> bar.warp.sync", "bar.warp.sync 0xffffffff;"))
    if "wait_group" in site.opcode:
        more = f"{site.opcode} {int(site.rest, 0) + 1}"
        made.append((f"{told} -> {more}", f"{more};"))
    return [Change(what, text) for what, text in made]


def changed(text: str, site: Site, change: Change) -> str:
    """The kernel with the change."""
    return text[: site.start] + change.text + text[site.end :]


def signature(found: list[Site]) -> tuple:
    """Variants of a kernel (dtypes, flags) that have the same one have all their sites in common."""
    return tuple((s.opcode, s.rest, s.source) for s in found)


@functools.lru_cache(maxsize=1024)
def digest(binary: bytes) -> str:
    """Of what the text makes a GPU do: without names of source lines."""
    code = re.sub(r"(?m)^\s*(?:\.loc\b|//|\$L__tmp\d+:)[^\n]*$", "", _code(binary.decode()))
    return hashlib.sha256("\n".join(code.split("\n")).encode()).hexdigest()[:16]


def _code(text: str) -> str:
    """Without the tables for debuggers behind the code."""
    end = re.search(r"(?m)^\s*\.(?:file|section)\b", text)
    return text[: end.start()] if end else text
