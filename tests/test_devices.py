"""The tests' cases on another device: the same numbers, strides and identities."""

import pytest
import torch

from fastlm._op import OPS
from fastlm.testing.cases import Draw, cases_of
from fastlm.testing.compare import device_of, moved


@pytest.mark.parametrize("name", OPS)
def test_moved_inputs_keep_strides_offsets_and_identity(name):
    for case in cases_of(name)[0]:
        inputs = case.inputs(Draw(0, torch.float16))
        there = moved(inputs, "meta")
        assert list(there) == list(inputs)
        for a, value in inputs.items():
            if not isinstance(value, torch.Tensor):
                assert there[a] is value
                continue
            found = there[a]
            assert (found.device.type, found.dtype, found.shape) == ("meta", value.dtype, value.shape)
            assert (found.stride(), found.storage_offset()) == (value.stride(), value.storage_offset())
            assert [b for b in inputs if there[b] is found] == [b for b in inputs if inputs[b] is value]


def test_moved_inputs_have_the_same_numbers(monkeypatch):
    wide = torch.arange(60.0).view(5, 12)
    inputs = {"slice": wide[:, 2:7], "expanded": wide[:1].expand(4, 12), "empty": wide[:0], "p": 0.5}
    found = moved(inputs, "cpu:0")  # another name of the CPU: so it is copied
    assert all(torch.equal(found[n], inputs[n]) for n in ("slice", "expanded", "empty"))
    assert found["slice"].data_ptr() != inputs["slice"].data_ptr()
    assert found["expanded"].stride(0) == 0
    assert moved(inputs, "cpu") is inputs


def test_kernels_for_gpus_run_there_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of(b) for b in ("cuda", "triton", "cpu", "reference")] == ["cuda", "cuda", "cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {device_of(b) for b in ("cuda", "triton", "cpu", "reference")} == {"cpu"}
