"""What nvcc makes of csrc/cuda is no worse than it was, and every shortcoming has its reason."""

from pathlib import Path

import pytest
import torch

from fastlm import ops
from fastlm._op import OPS
from fastlm._triton import simulated
from fastlm.testing.ptxsim import cuda, cuda_build
from fastlm.testing.static_bars import bars, table
from fastlm.testing.static_bars.calls import calls_of
from fastlm.testing.static_bars.cuda import launched, name_of
from fastlm.testing.static_bars.occupancy import LIMITS
from fastlm.testing.static_bars.record import described, measured

ROOT = Path(__file__).parent.parent
STORED, TRITONS = ROOT / "tests/static_bars_cuda.json", ROOT / "tests/static_bars.json"
PAGE = ROOT / "docs/cuda.md"
ROWS = [op for op in OPS if "attention" not in op]
USUAL = ("rope", "dropout_add")  # their machine code is made in a second


def _limits():
    """The stored limits; None where another nvcc is installed than the one that they hold for."""
    return bars.read(STORED, "cuda") if bars.stored_release(STORED, "cuda") == cuda_build.release() else None


@pytest.mark.parametrize("op", USUAL)
def test_usual_kernels_are_within_their_stored_limits(op):
    limits = _limits()
    if limits is None:
        with pytest.raises(ValueError, match="holds what the ptxas of nvcc .* run make bars"):
            bars.read(STORED, "cuda")
    else:
        assert not bars.worse(limits, measured(80, calls_of(op, "cuda"), "cuda"))


@pytest.mark.gpu_model
@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("op", ROWS)  # attention's take minutes: make bars
def test_every_kernel_is_within_its_stored_limits(op, arch):
    stored, found = bars.read(STORED, "cuda"), measured(arch, calls_of(op, "cuda"), "cuda")
    assert not bars.worse(stored, found)
    own = {key for key in stored if key.startswith(f"{op} ") and key.endswith(f" sm_{arch}")}
    assert own == set(found), "limits of kernels that are no longer launched: run make bars"


def test_every_op_has_stored_limits_for_every_architecture():
    found = {(key.split()[0], key.rpartition("_")[2]) for key in bars.stored_kernels(STORED)}
    assert found == {(op, str(arch)) for op in OPS for arch in LIMITS}


def test_what_a_kernel_misses_has_a_reason():
    assert not bars.unexplained(bars.stored_kernels(STORED), "cuda")


def test_page_shows_what_is_stored():
    text, kernels = PAGE.read_text(encoding="utf-8"), bars.stored_kernels(STORED)
    release = bars.stored_release(STORED, "cuda")
    shown = {"bars": table.markdown(kernels, release, "cuda")}
    shown["beside"] = table.beside(kernels, bars.stored_kernels(TRITONS))
    for name, expected in shown.items():
        found = text.partition(f"<!-- {name}:start -->")[2].partition(f"<!-- {name}:end -->")[0]
        assert found.strip() == expected, "run make bars"


def test_limits_of_another_release_of_nvcc_are_refused(tmp_path):
    file = tmp_path / "bars.json"
    file.write_text('{"nvcc": "12.8.61", "kernels": {}}')
    with pytest.raises(ValueError, match="holds what the ptxas of nvcc 12.8.61 makes"):
        bars.read(file, "cuda")


def test_rows_that_are_not_aligned_show_in_the_widths_of_accesses():
    x = torch.empty(8 * 64 + 1, dtype=torch.bfloat16)
    widths = []
    for rows in (x[:-1], x[1:]):
        (_, compiled), *_ = launched(80, lambda rows=rows: ops.softmax(rows.view(8, 64), backend="cuda"))
        (kernel,) = described(80, [compiled])
        widths.append((kernel.loads, kernel.stores))
    assert widths == [(128, 128), (16, 16)]


def test_launches_are_listed_and_nothing_is_executed():
    x = torch.ones(4, 64)
    with simulated("sm_80"):
        (launch,) = cuda.runtime().listed(lambda: ops.softmax(x, backend="cuda"))
    assert name_of(launch.kernel) == "softmax_forward_kernel" and launch.grid == (1, 1, 1)


def test_shared_memory_is_what_a_launch_asks_for_and_what_its_kernel_declares():
    q = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16)
    x = torch.empty(2, 4096)
    ((_, attention),) = launched(80, lambda: ops.attention(q, q, q, backend="cuda"))
    ((_, softmax),) = launched(80, lambda: ops.softmax(x, backend="cuda"))
    assert attention.shared == (128 + 2 * 32) * (64 + 8) * 2
    assert softmax.shared == 2 * 32 * 4  # a number of each of 32 warps, for the maximum and for the sum
