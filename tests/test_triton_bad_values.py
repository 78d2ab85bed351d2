"""On a GPU nobody looks at values before a kernel: a bad one is never read or written outside its tensor."""

import pytest
import torch
from test_attention_varlen import BAD_STARTS, judge_bad_starts

from fastlm.testing import ptxsim


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_a_target_that_is_no_class_is_nan_and_reads_nothing_outside(smoothing):
    logits, target = torch.randn(5, 40), torch.tensor([0, 40, 39, -1, 2**40])
    options = (-100, smoothing, 0.0, "none")
    with ptxsim.device("sm_80"):
        loss, maximum, exp_sum, count = torch.ops.fastlm.cross_entropy.triton(logits, target, *options)
        saved = (maximum, exp_sum, count, *options)
        dx = torch.ops.fastlm.cross_entropy_backward.triton(torch.ones(5), logits, target, *saved)
    good = [0, 2]
    assert loss.isnan().tolist() == [False, True, False, True, True]
    expected = torch.nn.functional.cross_entropy(
        logits[good], target[good], reduction="none", label_smoothing=smoothing
    )
    torch.testing.assert_close(loss[good], expected)
    assert dx[good].isfinite().all() and not dx[1].isfinite().logical_and(dx[1] != 0).any()


@pytest.mark.parametrize("name", BAD_STARTS)
def test_bad_starts_leave_nothing_uninitialised_and_reach_nothing_outside(name):
    with ptxsim.device("sm_80"):
        judge_bad_starts("triton", name)
