"""What was tuned, on disk: safe between processes, and ignored with a reason where it cannot be trusted."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastlm_triton import _config
from fastlm_triton._config import Config

from fastlm import _triton, _tuned
from fastlm.cli import doctor

ROOT = Path(__file__).parent.parent
GPU = "NVIDIA H100 80GB HBM3"
KEY = ("forward_config", 90, torch.bfloat16, (64, 128), None, "half", True, 2.5)
CONFIG = Config((128, 64), 8, 3)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """No test reads or writes what the user has tuned, nor leaves anything in the kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_config, "TUNED", {})
    load = _tuned.load  # a test may put something else there
    load.cache_clear()
    yield
    load.cache_clear()


def test_what_is_kept_is_read_back():
    file = _tuned.merge(GPU, {KEY: CONFIG})
    assert file == _tuned.file_of(GPU) and file.name.startswith("nvidia-h100-80gb-hbm3-triton-")
    assert _tuned.read(GPU) == ({KEY: CONFIG}, None)
    assert _tuned.read("another GPU") == ({}, None)


def test_findings_are_merged_replaced_and_forgotten():
    other = ("softmax_config", 90, 2048)
    _tuned.merge(GPU, {KEY: CONFIG})
    _tuned.merge(GPU, {other: Config((1, 2048), 4)})
    _tuned.merge(GPU, {KEY: Config((64, 64), 4, 2)})
    assert _tuned.read(GPU)[0] == {KEY: Config((64, 64), 4, 2), other: Config((1, 2048), 4)}
    _tuned.merge(GPU, {KEY: None})
    assert list(_tuned.read(GPU)[0]) == [other]
    assert _tuned.forget(GPU) and not _tuned.forget(GPU)
    assert _tuned.read(GPU) == ({}, None)


def test_processes_that_tune_at_once_lose_nothing():
    code = (
        "import sys; from fastlm import _tuned; from fastlm_triton._config import Config\n"
        "for i in range(20): _tuned.merge('a GPU', {('f', 90, int(sys.argv[1]), i): Config((i + 1,), 4)})"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(n)], cwd=ROOT) for n in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    found, reason = _tuned.read("a GPU")
    assert reason is None and set(found) == {("f", 90, n, i) for n in range(2) for i in range(20)}
    assert not [f for f in _tuned.folder().iterdir() if f.name.startswith(".tuned-")]


def _edited(change) -> Path:
    file = _tuned.merge(GPU, {KEY: CONFIG})
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


FOREIGN = {
    "schema": (lambda c: c.update(schema=0), "was made for schema 0, here is 1"),
    "gpu": (lambda c: c.update(gpu="A100"), f"was made for gpu A100, here is {GPU}"),
    "triton": (lambda c: c.update(triton="2.0"), "was made for triton 2.0, here is "),
    "fastlm": (lambda c: c.update(fastlm="9"), "was made for fastlm 9, here is "),
    "kernels": (lambda c: c.update(kernels="old"), "was made for kernels old, here is "),
    "no header": (lambda c: c.pop("gpu"), "is damaged"),
    "no configs": (lambda c: c.pop("configs"), "is damaged"),
    "a list": (lambda c: c.update(configs=[[]]), "is damaged"),
    "no block": (lambda c: c["configs"][0].pop("block"), "is damaged"),
    "a negative block": (lambda c: c["configs"][0].update(block=[-1]), "is damaged"),
    "warps as text": (lambda c: c["configs"][0].update(warps="8"), "is damaged"),
    "an unknown dtype": (lambda c: c["configs"][0].update(sizes=[{"dtype": "float9"}]), "is damaged"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_cannot_be_trusted_is_ignored_with_a_reason(name):
    change, said = FOREIGN[name]
    file = _edited(change)
    found, reason = _tuned.read(GPU)
    assert found == {} and reason.startswith(f"{file} {said}")
    assert reason.endswith("; run fastlm tune again")
    _tuned.merge(GPU, {KEY: CONFIG})  # which makes it whole
    assert _tuned.read(GPU) == ({KEY: CONFIG}, None)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00"])
def test_a_damaged_file_is_ignored_with_a_reason(text):
    file = _tuned.merge(GPU, {KEY: CONFIG})
    file.write_text(text)
    assert _tuned.read(GPU) == ({}, f"{file} is damaged; run fastlm tune again")


def test_a_file_that_cannot_be_read_is_ignored_with_a_reason():
    file = _tuned.file_of(GPU)
    file.mkdir(parents=True)
    assert _tuned.read(GPU) == ({}, f"{file} cannot be read: Is a directory")


def test_it_is_loaded_when_a_kernel_is_first_used_on_a_gpu(monkeypatch):
    kept, newer = ("f", 90, 1), ("f", 90, 2)
    _tuned.merge(GPU, {kept: CONFIG, newer: CONFIG})
    mine = Config((1,), 1)
    _config.TUNED[newer] = mine
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
    _tuned.load(0)
    assert {kept: CONFIG, newer: mine} == _config.TUNED  # what this process set stays


def _first_call(tensor: torch.Tensor, monkeypatch) -> list[int]:
    loaded: list[int] = []
    monkeypatch.setattr(_tuned, "load", loaded.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    module = type("module", (), {"forward": staticmethod(lambda t: t)})
    monkeypatch.setattr(_triton, "import_module", lambda name: module)
    run = _triton.body("an_op", "forward")
    assert run(tensor) is tensor and run(tensor) is tensor
    return loaded


def test_only_a_gpu_loads_it_and_once(monkeypatch):
    with torch._subclasses.FakeTensorMode():
        assert _first_call(torch.empty(3, device="cuda:0"), monkeypatch) == [0]
    assert _first_call(torch.empty(3), monkeypatch) == []


def test_a_tuned_configuration_that_does_not_fit_a_call_is_dropped(monkeypatch):
    class OutOfResources(Exception):
        """As Triton's."""

    def forward(t):
        if _config.TUNED:
            raise OutOfResources("shared memory")
        return t

    module = type("module", (), {"forward": staticmethod(forward)})
    monkeypatch.setattr(_triton, "import_module", lambda name: module)
    run, t = _triton.body("an_op", "forward"), torch.empty(3)
    _config.TUNED[KEY] = CONFIG
    assert run(t) is t and _config.TUNED == {}

    def always(t):
        raise OutOfResources("shared memory")

    module.forward = staticmethod(always)
    with pytest.raises(OutOfResources):  # where nothing was tuned, it is the kernel's own
        _triton.body("an_op", "forward")(t)


def test_doctor_says_what_was_tuned(monkeypatch):
    assert doctor._tuned_words(None) == "no GPU with Triton kernels"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
    assert doctor._tuned_words(_tuned.state()).startswith("nothing; fastlm tune finds")
    file = _tuned.merge(GPU, {KEY: CONFIG})
    assert doctor._tuned_words(_tuned.state()) == f"1 configurations, in {file}"
    file.write_text("{")
    assert doctor._tuned_words(_tuned.state()) == f"ignored: {file} is damaged; run fastlm tune again"


def test_a_size_that_cannot_be_kept_is_told():
    with pytest.raises(TypeError, match="a size of type partial cannot be kept"):
        _tuned.merge(GPU, {("f", 90, functools.partial(print)): CONFIG})
