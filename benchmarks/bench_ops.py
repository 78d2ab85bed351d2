"""fastlm's CPU kernels against torch eager, op by op: forward + backward, interleaved in one process.

Run: make bench. Prints medians and ratios; above 1 means that fastlm is faster. These machines are shared:
believe ratios, not times. Both sides allocate as torch does by default.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from fastlm import ops

ROUNDS = 9


def normal(*shape: int) -> torch.Tensor:
    """A leaf of normal numbers that wants a gradient."""
    return torch.randn(shape, requires_grad=True)


def forward_backward(call: Callable, *inputs: torch.Tensor) -> Callable[[], None]:
    """A function that runs call(*inputs) and its backward once."""
    dy = torch.randn_like(call(*inputs))

    def step() -> None:
        torch.autograd.grad(call(*inputs), inputs, dy)

    return step


def rows() -> Iterator[tuple[str, Callable, Callable]]:
    """(name, baseline, fastlm) of every comparison."""
    x, r, w, b = normal(4096, 768), normal(4096, 768), normal(768), normal(768)

    def pair(name, baseline, ours, *inputs):
        return name, forward_backward(baseline, *inputs), forward_backward(ours, *inputs)

    yield pair(
        "layer_norm [4096,768]", lambda *t: F.layer_norm(t[0], (768,), *t[1:]), ops.layer_norm, x, w, b
    )
    yield pair(
        "dropout + residual + layer_norm [4096,768]",
        lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.1) + r, (768,), w, b),
        lambda x, r, w, b: ops.layer_norm(x, w, b, residual=r, dropout_p=0.1).y,
        *(x, r, w, b),
    )
    yield pair(
        "dropout + residual [4096,768]",
        lambda x, r: F.dropout(x, 0.1) + r,
        lambda x, r: ops.dropout_add(x, r, dropout_p=0.1),
        *(x, r),
    )
    yield pair("softmax [4096,768]", lambda t: F.softmax(t, -1), ops.softmax, x)
    yield pair("bias + gelu [4096,768]", lambda x, b: F.gelu(x + b), ops.bias_act, x, b)
    yield pair(
        "bias + gelu_tanh [4096,768]",
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        lambda x, b: ops.bias_act(x, b, "gelu_tanh"),
        *(x, b),
    )
    yield pair(
        "bias + relu [4096,768]", lambda x, b: F.relu(x + b), lambda x, b: ops.bias_act(x, b, "relu"), x, b
    )
    target = torch.randint(768, (4096,))
    yield pair(
        "cross_entropy [4096,768]",
        lambda t: F.cross_entropy(t, target),
        lambda t: ops.cross_entropy(t, target),
        x,
    )
    yield from larger(pair)


def larger(pair: Callable) -> Iterator[tuple[str, Callable, Callable]]:
    """The ops that contain a matmul."""
    x, w1, b1, w2, b2 = normal(1024, 768), normal(3072, 768), normal(3072), normal(768, 3072), normal(768)
    for p in (0.0, 0.1):
        yield pair(
            f"feed_forward [1024,768,3072] dropout {p}",
            lambda x, w1, b1, w2, b2, p=p: F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), p), w2, b2),
            lambda x, w1, b1, w2, b2, p=p: ops.feed_forward(x, w1, b1, w2, b2, dropout_p=p),
            *(x, w1, b1, w2, b2),
        )
    for shape in ((4, 12, 512, 64), (1, 16, 2048, 128)):
        q, k, v = (normal(*shape) for _ in range(3))
        for p in (0.0, 0.1):
            yield pair(
                f"attention causal {list(shape)} dropout {p}",
                lambda q, k, v, p=p: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p),
                lambda q, k, v, p=p: ops.attention(q, k, v, causal=True, dropout_p=p),
                *(q, k, v),
            )
        if shape[1] == 12:
            with torch.no_grad():
                yield (
                    f"attention causal {list(shape)} forward only",
                    lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                    lambda q=q, k=k, v=v: ops.attention(q, k, v, causal=True),
                )


def medians(baseline: Callable, ours: Callable) -> tuple[float, float]:
    """Seconds of each, the median of ROUNDS interleaved runs after one to warm up."""
    baseline(), ours()
    times: tuple[list, list] = ([], [])
    for _ in range(ROUNDS):
        for seconds, call in zip(times, (baseline, ours), strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Measures and prints the table."""
    table = Table("forward + backward, float32", "torch ms", "fastlm ms", "fastlm faster by")
    for name, baseline, ours in rows():
        before, after = medians(baseline, ours)
        table.add_row(name, f"{before * 1e3:.1f}", f"{after * 1e3:.1f}", f"{before / after:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
