"""linear_cross_entropy's refusals: the argument, what was wanted and what came, before any kernel runs."""

import pytest
import torch

from fastlm.ops import linear_cross_entropy
from fastlm.testing.compare import KernelCalls

X, W, T = torch.ones(3, 8), torch.ones(5, 8), torch.tensor([1, 2, 3])
BAD = [
    ((3.0, W, T), {}, TypeError, "x must be a tensor, got float"),
    ((X.long(), W, T), {}, TypeError, "x must be float32, float16, .*, got torch.int64"),
    ((torch.tensor(1.0), W, T), {}, ValueError, "x must have a last axis, got"),
    ((X, "w", T), {}, TypeError, "weight must be a tensor, got str"),
    ((X, W[:, :7], T), {}, ValueError, r"weight must have shape \[classes, 8\] on cpu, got .*\(5, 7\)"),
    ((X, W[0], T), {}, ValueError, r"weight must have shape \[classes, 8\] on cpu, got .*\(8,\)"),
    ((X, W[:0], T), {}, ValueError, r"weight must have at least one class, got .*\(0, 8\)"),
    ((X, W.half(), T), {}, TypeError, "weight must be torch.float32 as x, got torch.float16"),
    ((X, W.to("meta"), T), {}, ValueError, r"weight must have shape \[classes, 8\] on cpu, got .* on meta"),
    ((X, W, T), {"bias": torch.ones(8)}, ValueError, r"bias must have shape \[5\] on cpu, got .*\(8,\)"),
    ((X, W, T), {"bias": torch.ones(5).half()}, TypeError, "bias must be torch.float32 as x"),
    ((X, W, T.int()), {}, TypeError, "target must be an int64 tensor, got torch.int32"),
    ((X, W, T[:2]), {}, ValueError, r"target must have shape \(3,\) on cpu, got .*\(2,\)"),
    ((X, W, T), {"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
    ((X, W, T), {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ((X, W, T), {"z_loss": -1.0}, ValueError, "z_loss must not be negative, got -1.0"),
    (
        (X, W, T),
        {"reduction": "max"},
        ValueError,
        "reduction must be one of 'none', 'sum', 'mean', got 'max'",
    ),
    ((X, W, T), {"backend": "fast"}, ValueError, "backend must be one of .*, got 'fast'"),
]


@pytest.mark.parametrize(("args", "kwargs", "kind", "message"), BAD)
def test_bad_input_is_named_before_any_kernel_runs(args, kwargs, kind, message):
    with KernelCalls() as calls, pytest.raises(kind, match="^linear_cross_entropy: " + message):
        linear_cross_entropy(*args, **kwargs)
    assert calls.names == []
