"""What the Triton kernels compile to is no worse than it was, and the instruments that tell see faults."""

import ctypes
import functools
import os
import subprocess
from pathlib import Path

import planted_kernels
import pytest
import torch
import triton

from fastlm._op import OPS
from fastlm.testing.static_bars import bars, table
from fastlm.testing.static_bars.calls import calls_of
from fastlm.testing.static_bars.compiled import launched
from fastlm.testing.static_bars.occupancy import LIMITS, occupancy
from fastlm.testing.static_bars.record import described, measured
from fastlm.testing.static_bars.sass import Instruction, loops

ROOT = Path(__file__).parent.parent
STORED = ROOT / "tests/static_bars.json"
PAGE = ROOT / "docs/evidence.md"
USUAL = {  # one of a kind; all others: make test-gpu-model
    "layer_norm": "4096 bf16",
    "cross_entropy": "50304 bf16",
    "feed_forward": "8192 of 768x3072 gelu bf16",
}


@pytest.mark.parametrize("arch", [80, 90])
def test_usual_kernels_are_within_their_stored_limits(arch):
    calls = [call for op, case in USUAL.items() for call in calls_of(op) if str(call) == f"{op} {case}"]
    assert len(calls) == len(USUAL)
    assert not bars.worse(bars.read(STORED), measured(arch, calls))


def test_what_several_calls_launch_is_one_kernel():
    def scale():  # which Triton compiles for all n that are multiples of 16, and looks up for each
        for n in (16, 32, 48):
            torch.ops.fastlm.scale_units.triton(torch.empty(n), torch.ones(()))

    assert [name for name, _ in launched(80, scale)] == ["scale_all"]


@pytest.mark.gpu_model
@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("op", dict.fromkeys(key.split()[0] for key in bars.read(STORED)))
def test_every_kernel_is_within_its_stored_limits(op, arch):
    stored = bars.read(STORED)
    found = measured(arch, calls_of(op))
    assert not bars.worse(stored, found)
    own = {key for key in stored if key.startswith(f"{op} ") and key.endswith(f" sm_{arch}")}
    assert own == set(found), "limits of kernels that are no longer launched: run make bars"


def test_every_op_has_stored_limits():
    assert {key.split()[0] for key in bars.read(STORED)} == set(OPS)


def test_what_a_kernel_misses_has_a_reason():
    assert not bars.unexplained(bars.read(STORED))


def test_page_shows_what_is_stored():
    _, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- bars:start -->")
    shown = rest.partition("<!-- bars:end -->")[0].strip()
    assert shown == table.markdown(bars.read(STORED), triton.__version__), "run make bars"


def test_limits_of_another_release_of_triton_are_refused(tmp_path):
    file = tmp_path / "bars.json"
    file.write_text('{"triton": "3.7.0", "kernels": {}}')
    with pytest.raises(ValueError, match="holds what the ptxas of Triton 3.7.0 makes"):
        bars.read(file)


def test_stored_kernels_are_read_back(tmp_path):
    kernels = bars.read(STORED)
    bars.write(tmp_path / "bars.json", kernels)
    assert bars.read(tmp_path / "bars.json") == kernels


def test_a_worse_kernel_is_told_with_its_numbers():
    stored = _first_of(bars.read(STORED))
    (key, kernel) = next(iter(stored.items()))
    less, more = (
        kernel._replace(registers=kernel.registers - 1),
        kernel._replace(registers=kernel.registers + 1),
    )
    assert bars.worse(stored, {key: less}) == []
    assert bars.worse(stored, {key: more}) == [
        f"{key}: registers {more.registers}, the limit is {kernel.registers}"
    ]
    assert bars.worse({}, stored) == [f"{key}: no limits are stored: run make bars"]
    multiplying = {key: kernel._replace(matrix="HMMA", copies="LDGSTS")}
    assert bars.worse(multiplying, stored) == [
        f"{key}: no HMMA in its main loop any more",
        f"{key}: no LDGSTS in its main loop any more",
    ]


def _first_of(kernels):
    key = next(iter(kernels))
    return {key: kernels[key]._replace(matrix="", copies="")}


@pytest.fixture(scope="session")
def calculator(tmp_path_factory):
    """NVIDIA's occupancy calculator, from the header that comes with Triton."""
    library = tmp_path_factory.mktemp("occupancy") / "probe.so"
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source = ROOT / "tests/native/occupancy_probe.cpp"
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{include}", source, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).resident_blocks


@pytest.mark.parametrize("arch", LIMITS)
def test_occupancy_is_what_nvidias_calculator_finds(arch, calculator):
    limits = LIMITS[arch]
    given = (limits.warps * 32, limits.shared, limits.block_shared)
    for registers in (16, 24, 32, 33, 40, 42, 56, 64, 65, 72, 96, 104, 128, 129, 168, 200, 255):
        for shared in (
            0,
            16,
            1000,
            8 << 10,
            12289,
            33 << 10,
            48 << 10,
            64 << 10,
            99 << 10,
            101 << 10,
            227 << 10,
        ):
            for threads in (32, 64, 96, 128, 160, 256, 288, 384, 512, 1024):
                expected = calculator(arch, *given, registers, shared, threads)
                assert occupancy(arch, registers, shared, threads).blocks == expected, (
                    registers,
                    shared,
                    threads,
                )


def test_occupancy_says_what_there_is_no_more_of():
    assert occupancy(80, 32, 0, 128) == (16, 1.0, "warps")
    assert occupancy(80, 255, 0, 128) == (2, 0.125, "registers")
    assert occupancy(90, 128, 100 << 10, 256) == (2, 0.25, "registers")
    assert occupancy(120, 64, 48 << 10, 128) == (2, 8 / 48, "shared memory")
    assert occupancy(120, 16, 0, 32) == (24, 0.5, "blocks")
    assert occupancy(120, 64, 100 << 10, 128) == (0, 0.0, "shared memory")


def test_loops_are_found_where_branches_go_back():
    code = [
        (0, "MOV", "R1", True),
        (16, "ISETP", "P0", True),  # 16 ... 80: the outer loop
        (32, "HMMA.16816", "R4", True),  # 32 ... 48: the inner one
        (48, "BRA", "0x20", False),
        (64, "CALL.REL.NOINC", "0x80", True),
        (80, "BRA", "P0, 0x10", True),
        (96, "EXIT", "", True),
        (112, "BRA", "0x70", True),  # padding that nothing reaches
        (128, "MUFU.RCP", "R2", True),
        (144, "RET.REL", "R20", True),
    ]
    assert loops([Instruction(*each) for each in code]) == [{32, 48}, {16, 32, 48, 64, 80}]


def test_a_switch_goes_where_its_table_says():
    code = [(0, "MOV", "R1", True), (16, "BRX", "R4 -0x20", True), (32, "FADD", "R2", True)]
    code += [(48, "BRA", "0x0", True), (64, "FMUL", "R2", True), (80, "EXIT", "", True)]
    instructions = [Instruction(*each) for each in code]
    assert loops(instructions, (32, 64)) == [{0, 16, 32, 48}]
    with pytest.raises(ValueError, match="where does BRX R4 -0x20 go to"):
        loops(instructions)


def _kernels_of(arch, *runs):
    return described(arch, [compiled for run in runs for _, compiled in launched(arch, run)])


def test_access_widths_follow_what_sizes_divide_by():
    x = torch.empty(4096, dtype=torch.bfloat16)
    whole, odd = _kernels_of(
        80,
        lambda: planted_kernels.copied[(4,)](x, x, 4096, 1024),
        lambda: planted_kernels.copied[(4,)](x[1:], x[1:], 4095, 1024),
    )
    assert (whole.loads, whole.stores, whole.wide) == (128, 128, 100)
    assert (odd.loads, odd.stores, odd.wide) == (16, 16, 0)


def test_spilled_registers_and_atomics_are_seen():
    x = torch.empty(1 << 20)
    roomy, tight, counted = _kernels_of(
        80,
        lambda: planted_kernels.crowded[(1,)](x, x, 16, 1024, 3, num_warps=1),
        lambda: planted_kernels.crowded[(1,)](x, x, 16, 1024, 3, num_warps=1, maxnreg=40),
        lambda: planted_kernels.counted[(1,)](x, x, 128),
    )
    assert (roomy.spills, roomy.stack, roomy.atomics) == (0, 0, 0)
    assert tight.spills > 0 and tight.stack > 0 and tight.registers <= 40
    assert counted.atomics > 0


_UNITS = [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")]
_LONG = pytest.mark.gpu_model


@pytest.mark.parametrize(("arch", "unit"), [pytest.param(*u, marks=[_LONG] * (u[0] > 90)) for u in _UNITS])
def test_main_loops_tell_their_matrix_unit_and_whether_copies_are_in_flight(arch, unit):
    x, out = torch.empty(1 << 16, dtype=torch.float16), torch.empty(1 << 14)
    ahead, behind = _kernels_of(
        arch,
        *(
            functools.partial(planted_kernels.multiplied[(1,)], x, x, out, 512, 64, stages)
            for stages in (3, 1)
        ),
    )
    assert (ahead.matrix, ahead.copies, ahead.bare) == (unit, "LDGSTS", 0)
    assert (behind.matrix, behind.copies, behind.bare) == (unit, "", 1)
