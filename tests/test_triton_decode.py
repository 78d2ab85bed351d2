"""What decoding's Triton kernels keep: no allocations, launches for a CUDA graph, nothing outside a cache."""

import pytest
import torch
from decoding import check_tokens_without_a_slot_are_dropped, raw_arguments
from fastlm_triton import decode_attention as kernels
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import ops
from fastlm.testing import ptxsim

NAN = float("nan")


class Allocations(TorchDispatchMode):
    """Counts the tensors that are made inside it."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.made.append(func)
        return result


@pytest.mark.parametrize(
    ("case", "made"), [("plain", 2), ("pieces", 3), ("int8-paged", 2), ("everything", 3)]
)
def test_decoding_makes_its_outputs_and_one_workspace(case, made):
    arguments = raw_arguments(case, torch.float32)
    with ptxsim.device("sm_80"):
        kernels.forward(*arguments)
        with Allocations() as allocations:
            kernels.forward(*arguments)
    assert len(allocations.made) == made, allocations.made


def test_a_launch_does_not_depend_on_what_the_lengths_are(monkeypatch):
    launches = []
    monkeypatch.setattr(kernels, "launch", lambda *args, **options: launches.append((args, options)))
    arguments = raw_arguments("pieces", torch.float32)
    for lengths in (1100, 513), (0, 1):
        arguments[3] = torch.tensor(lengths, dtype=torch.int32)
        with ptxsim.device("sm_80"):
            kernels.forward(*arguments)
    numbers = [([a for a in args if not isinstance(a, torch.Tensor)], o) for args, o in launches]
    assert len(launches) == 4 and numbers[:2] == numbers[2:]


@pytest.mark.parametrize("lengths", [(1101, -3), (1 << 30, -(1 << 31))])
def test_lengths_outside_the_cache_are_those_of_its_ends(lengths):
    arguments = raw_arguments("pieces", torch.float32)
    with ptxsim.device("sm_80"):
        arguments[3] = torch.tensor((1100, 0), dtype=torch.int32)
        wanted = kernels.forward(*arguments)
        arguments[3] = torch.tensor(lengths, dtype=torch.int32)
        got = kernels.forward(*arguments)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_page_numbers_outside_the_cache_are_not_followed():
    arguments = raw_arguments("paged-shared", torch.float32)
    table = arguments[4] = torch.tensor([[3, 5, 1 << 30], [-1, 4, 0]], dtype=torch.int32)
    with ptxsim.device("sm_80"):
        got = kernels.forward(*arguments)
        arguments[4] = torch.where((table >= 0) & (table < 5), table, 0)
        wanted = kernels.forward(*arguments)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_the_same_bits_however_far_the_cache_could_reach():
    """Capacity sets the number of splits; where it is the same, slots that nobody fills change nothing."""
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 700, 16), torch.randn(1, 2, 700, 16)
    lengths = torch.tensor([650], dtype=torch.int32)
    longer = [torch.cat([t, t.new_full((1, 2, 60, 16), NAN)], 2) for t in (k, v)]
    with ptxsim.device("sm_80"):
        first = ops.decode_attention(q, k, v, lengths, backend="triton")
        second = ops.decode_attention(q, *longer, lengths, backend="triton")
    assert torch.equal(first, second)


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_tokens_without_a_slot_are_dropped(paged, quantised):
    check_tokens_without_a_slot_are_dropped("triton", paged, quantised, far=1 << 30)


def test_what_is_refused_is_refused_in_one_sentence():
    lengths = torch.ones(1, dtype=torch.int32)
    wide, cache = torch.zeros(1, 1, 1, 257), torch.zeros(1, 1, 4, 257)
    scattered = torch.zeros(1, 1, 8, 4).transpose(2, 3)
    new = torch.zeros(1, 1, 1, 8)
    with ptxsim.device("sm_80"):
        with pytest.raises(NotImplementedError) as error:
            ops.decode_attention(wide, cache, cache, lengths, backend="triton")
        assert str(error.value) == "decode_attention.triton takes head dims up to 256, got 257"
        with pytest.raises(NotImplementedError) as error:
            ops.append_kv(new, new, scattered, scattered, lengths, backend="triton")
        sentence = "append_kv.triton takes caches whose last dimension is contiguous, k_cache has stride 4"
        assert str(error.value) == sentence
