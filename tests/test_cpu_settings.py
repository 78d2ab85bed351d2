"""fastlm.cpu: what it refuses, its default limit, and what doctor shows of it."""

import pytest
import torch

from fastlm import _load, cpu
from fastlm.cli import doctor, doctor_memory

MB = 1 << 20

BAD_LIMITS = {
    "a fraction": (0.25, TypeError, "limit must be a number of bytes or None, got 0.25"),
    "a truth": (True, TypeError, "got True"),
    "words": ("1 GB", TypeError, "got '1 GB'"),
    "below zero": (-1, ValueError, r"limit must be 0 to \d+ bytes \(the memory here\), got -1"),
    "more than there is": (1 << 62, ValueError, r"limit must be 0 to \d+ bytes"),
}


@pytest.mark.parametrize("name", BAD_LIMITS)
def test_bad_limit_changes_nothing(name):
    limit, error, said = BAD_LIMITS[name]
    with pytest.raises(error, match=f"^reuse_memory: .*{said}"):
        cpu.reuse_memory(limit)
    assert not cpu.memory_statistics().on


def test_without_the_native_library_the_reason_is_given(monkeypatch):
    monkeypatch.setitem(_load.MISSING, "cpu", "no compiler was found")
    with pytest.raises(RuntimeError, match="^reuse_memory: no compiler was found$"):
        cpu.reuse_memory()
    assert cpu.trim() == 0 and not cpu.memory_statistics().on


def test_the_default_limit_is_a_quarter_of_what_a_container_may_have(monkeypatch, tmp_path):
    file = tmp_path / "memory.max"
    monkeypatch.setattr(cpu, "_LIMIT_FILES", (str(tmp_path / "none"), str(file)))
    machine = cpu._memory()
    file.write_text("max\n")
    assert cpu._memory() == machine
    file.write_text(f"{100 * MB}\n")
    assert cpu._memory() == 100 * MB
    taken = []
    monkeypatch.setattr(cpu._OPS, "cpu_reuse_memory", taken.append, raising=False)
    monkeypatch.setattr(cpu, "_reusing", False)
    cpu.reuse_memory()
    assert taken == [25 * MB]


def test_instruction_set_and_threads_are_those_of_the_kernels():
    assert cpu.instruction_set() == _load.ISA
    assert cpu.threads() == torch.get_num_threads()


def test_doctor_shows_what_it_did():
    found = doctor_memory.gain()
    assert set(found["relu_32_mb_ms"]) == {"default", "reused"}
    seen = cpu.MemoryStatistics(**found["statistics"])
    assert (seen.on, seen.hits, seen.misses) == (True, 6, 1)
    assert found["trimmed"] == seen.idle == 32 * MB
    here = cpu.MemoryStatistics(True, 64 * MB, 32 * MB, 0, 6, 1)._asdict()
    words = doctor._reuse_words(here, found)
    assert words.startswith("on: 6 of 7 large tensors from memory used before, 32 of at most 64 MB idle; ")
    off = doctor._reuse_words(cpu.memory_statistics()._asdict(), {"failed": "no compiler"})
    assert off == "off; not measured: no compiler"
