"""The null launcher: launches are counted, and each side of the measurement does what it is there for."""

import pytest
import torch

from fastlm._op import OPS
from fastlm.testing import launches


@pytest.mark.parametrize(
    "name, backward, count",
    [("softmax", False, 1), ("cross_entropy", False, 2), ("attention", True, 2), ("append_kv", False, 1)],
)
def test_launches_are_counted(name, backward, count, monkeypatch):
    monkeypatch.setattr(launches, "CALLS", 2)
    found = launches.measure(name, backward, rounds=1)
    assert found.launches == count and min(found[1:]) > 0


def test_what_a_launch_adds_is_the_difference_of_the_sides_by_launches():
    assert launches.Overhead(2, 50.0, 20.0, 10.0).of_a_launch_us == 15.0


def test_the_sides(monkeypatch):
    """With launches, without, and the twin: 1, 0 and 0 of them a call; outputs are alike."""
    seen = []

    def note(raw, arguments):
        before = driver.launches
        outputs = raw(*arguments)
        seen.append((raw.name(), driver.launches - before, outputs.shape))
        return 1e-6

    driver, x = launches._driver(80), torch.Size([64])
    monkeypatch.setattr(launches, "_seconds", note)
    launches.measure("softmax", rounds=1)
    assert [count for _, count, _ in seen] == [1, 0, 0]
    assert all(shape == x for *_, shape in seen)
    assert seen[0][0] == seen[1][0] == "fastlm::softmax.triton" and seen[2][0].startswith(
        "fastlm_twins::softmax"
    )


def test_the_table_has_every_kernel(monkeypatch):
    monkeypatch.setattr(launches, "measure", lambda name, backward: launches.Overhead(1, 30.0, 20.0, 10.0))
    lines = launches.table().splitlines()
    assert len(lines) == 2 + len(OPS) + sum(bool(op.backward) for op in OPS.values())
    assert "| softmax, backward | 1 | 10 | 30 | 20 | 10 |" in lines
