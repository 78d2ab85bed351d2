"""csrc/toolchain.py: sources compiled together, and what makes an object out of date."""

import ctypes
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

SOURCES = {
    "shared.h": """#pragma once
#define SEEN extern "C" __attribute__((visibility("default")))
inline int shared() { return 1; }
""",
    "a.cpp": '#include "shared.h"\nSEEN int a() { return shared(); }\n',
    "b.cpp": '#include "shared.h"\nSEEN int b() { return 2; }\n',
}
EARLIER, LATER = 1e9, 2e9  # seconds: in 2001, in 2033


@pytest.fixture
def toolchain(tmp_path):
    """The module in a csrc of its own."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    for name, text in SOURCES.items():
        (csrc / name).write_text(text)
    shutil.copy(Path(__file__).parents[1] / "csrc/toolchain.py", csrc)
    spec = importlib.util.spec_from_file_location("toolchain_of_a_copy", csrc / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _both(toolchain):
    """The object of all sources that are there."""
    csrc = Path(toolchain.__file__).parent
    return toolchain.compiled(sorted(csrc.glob("*.cpp")), csrc.parent / "objects/both.o", "-O1")


def _write(csrc, name, text, at=LATER):
    (csrc / name).write_text(text)
    os.utime(csrc / name, (at, at))


def test_sources_compiled_together_are_one_object(toolchain, tmp_path):
    library = ctypes.CDLL(str(toolchain.run(["-shared", _both(toolchain)], tmp_path / "both.so")))
    assert (library.a(), library.b()) == (1, 2)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda csrc: None, False),
        (lambda csrc: _write(csrc, "unused.h", ""), False),
        (lambda csrc: _write(csrc, "shared.h", SOURCES["shared.h"]), True),
        (lambda csrc: _write(csrc, "b.cpp", SOURCES["b.cpp"]), True),
        (lambda csrc: _write(csrc, "c.cpp", "int c() { return 3; }", EARLIER), True),
        (lambda csrc: (csrc / "b.cpp").unlink(), True),
        (lambda csrc: (csrc.parent / "objects/both.d").unlink(), True),
    ],
    ids=["nothing", "a-strange-file", "a-header", "a-source", "one-more", "one-less", "no-list"],
)
def test_an_object_is_made_anew_when_what_it_was_made_from_changes(toolchain, change, again):
    target = _both(toolchain)
    target.write_bytes(b"as it was")
    change(Path(toolchain.__file__).parent)
    assert (_both(toolchain).read_bytes() != b"as it was") == again
