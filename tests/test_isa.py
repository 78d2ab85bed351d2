"""Every instruction set passes every case; each in a process of its own, for torch chooses once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHOSEN = torch.backends.cpu.get_cpu_capability()
OTHERS = {"AVX512": ["avx2", "default"], "AVX2": ["default"]}.get(CHOSEN, [])


@pytest.mark.parametrize("isa", OTHERS)
def test_every_case_passes_on_a_lesser_instruction_set(isa):
    root = Path(__file__).parent.parent
    check = f"from fastlm import _load; assert (_load.ISA, _load.MISSING['cpu']) == ({isa!r}, None)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": isa}
    subprocess.run([sys.executable, "-c", check], check=True, env=environment, cwd=root)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "tests/test_ops.py",
        "-k",
        "not triton and not cuda",
    ]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
