"""The Triton matmul's large tiles, which only large problems choose: the same values and gradients."""

import pytest
import torch

from fastlm import ops
from fastlm.testing import ptxsim
from fastlm.testing.cases import Draw
from fastlm.testing.cases.feed_forward import layer
from fastlm.testing.compare import verdicts

matmul = pytest.importorskip("fastlm_triton._matmul")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_large_tiles_end_inside_one_and_leave_their_sums(arch, monkeypatch):
    """136 rows, 264 hidden: two or three tiles each way, the last ones mostly outside."""
    number = int(arch[3:5])
    large = matmul.matmul_config(number, "half", 1 << 14, 1 << 14, 1 << 12)
    assert large.block[0] == 128 and large.block[4] == 1
    monkeypatch.setattr(matmul, "matmul_config", lambda arch, kind, m, n, k: large)
    d = Draw(0, torch.bfloat16)
    inputs = {"x": d.normal(136, 24), "dropout_p": 0.2, "seed": 3} | layer(d, 24, 264, 16)
    with ptxsim.device(arch):
        found = verdicts(ops.feed_forward, [inputs], ("x", "w1", "b1", "w2", "b2"), "triton")
    assert all(v.ratio <= 1 for v in found), "\n".join(map(str, found))


def test_a_tile_is_split_only_where_tiles_are_few_and_sums_long():
    splits = [
        matmul.matmul_config(80, "half", *sizes).block[4] for sizes in ((64, 64, 512), (64, 64, 1 << 14))
    ]
    assert splits == [1, 32]
    assert matmul.matmul_config(80, "half", 1 << 12, 1 << 12, 1 << 14).block[4] == 1


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("sizes", [(0, 16, 16), (1, 1, 0), (16, 4096, 4096), (1 << 14, 1 << 14, 1 << 12)])
def test_a_tile_fits_in_shared_memory(arch, kind, sizes):
    (rows, cols, depth, *_), _, stages = matmul.matmul_config(arch, kind, *sizes)
    assert (rows + cols) * depth * (2 if kind == "half" else 4) * stages <= ptxsim.driver.SHARED[arch]
