"""Small and large sizes of every op: where is what fastlm chooses by itself slower than torch?"""

from dataclasses import replace
from statistics import median

import torch

import fastlm

from .clock import clock_of, interleaved
from .measure import ratio, summary
from .registry import WORKLOADS
from .sides import sides
from .workload import Workload

LIMIT_S, _SAMPLE_S = 1.5, 0.003  # of one point's rounds, and of one sample
_ROWS = ((1, 64), (16, 256), (64, 768), (512, 768), (4096, 768), (4096, 4096))
SIZES = {
    ("layer_norm", "gpt2"): _ROWS,
    ("layer_norm", "dropout_residual"): _ROWS,
    ("rms_norm", "tinyllama"): _ROWS,
    ("dropout_add", "gpt2"): _ROWS,
    ("bias_act", "gpt2_gelu_tanh"): _ROWS,
    ("glu", "tinyllama_silu"): _ROWS,
    ("cross_entropy", "small_vocabulary"): (*_ROWS, (256, 50257)),
    ("softmax", "causal"): (
        (1, 1, 8, 8),
        (1, 4, 64, 64),
        (2, 12, 128, 128),
        (4, 12, 512, 512),
        (1, 4, 2048, 2048),
    ),
    ("rope", "tinyllama"): (
        (1, 4, 1, 64),
        (1, 8, 16, 64),
        (2, 12, 256, 64),
        (4, 32, 1024, 64),
        (4, 32, 2048, 64),
    ),
    ("attention", "gpt2_causal"): tuple((1, 8, s, 64) for s in (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)),
    ("attention", "half_lengths"): ((1, 8, 16, 64), (4, 8, 64, 64), (8, 8, 256, 64), (2, 8, 1024, 128)),
    ("attention_varlen", "16_to_256_tokens"): ((2, 4, 16, 4, 64), (8, 8, 64, 8, 64), (16, 16, 256, 8, 64)),
    ("decode_attention", "cached"): ((1, 8, 16, 64), (1, 8, 256, 64), (4, 12, 1024, 64), (1, 32, 4096, 128)),
    ("append_kv", "one_token"): ((1, 8, 16, 64), (8, 12, 1024, 64)),
    ("feed_forward", "gpt2"): ((1, 64, 256), (16, 256, 1024), (128, 768, 3072), (1024, 768, 3072)),
    ("linear_cross_entropy", "gpt2"): ((16, 64, 256), (128, 256, 4096), (512, 512, 16384)),
}


def points(op_names: list[str], quick: bool) -> list[tuple[Workload, str, str]]:
    """(workload at a size, dtype, direction) of every point of these ops, all if none is named.

    quick: only each workload's first two sizes, in float32.
    """
    known = {(w.op, w.name): w for w in WORKLOADS if w.op in (op_names or [w.op])}
    return [
        (replace(known[name], size=size), dtype, direction)
        for name, sizes in SIZES.items()
        if name in known
        for size in (sizes[:2] if quick else sizes)
        for dtype in (("f32",) if quick else ("f32", "bf16"))
        for direction in (("forward",) if known[name].directions == ("forward",) else ("forward", "both"))
    ]


def measured(workload: Workload, dtype: str, direction: str, device: str, baselines, rounds: int) -> dict:
    """One point against the best baseline; what looks slower is measured again, with three times the rounds.

    "slower" says that fastlm lost by more than the noise: both times its median was above, and three
    quarters of the rounds went against it.
    """
    steps = sides(workload, dtype, direction, device, baselines, [None])
    runs_on = fastlm.explain(workload.op, **workload.arguments(dtype, device)).chosen
    with torch.inference_mode(direction == "forward"):
        times = interleaved(steps, rounds, clock_of(device), LIMIT_S, _SAMPLE_S)
        if lost(times):
            times = interleaved(steps, 3 * rounds, clock_of(device), 3 * LIMIT_S, _SAMPLE_S)
    best = best_of(times)
    return {
        "op": workload.op,
        "workload": workload.name,
        "size": list(workload.size),
        "dtype": dtype,
        "direction": direction,
        "runs_on": runs_on,
        "sides": {name: summary(seconds) for name, seconds in times.items()},
        "best_baseline": best,
        "ratio": ratio(times[best], times["fastlm"]),
        "slower": lost(times),
    }


def best_of(times: dict[str, list[float]]) -> str:
    """The baseline with the smallest median."""
    return min((name for name in times if name != "fastlm"), key=lambda name: median(times[name]))


def lost(times: dict[str, list[float]]) -> bool:
    """Whether fastlm was slower than the best baseline in the median and in three quarters of the rounds."""
    found = ratio(times[best_of(times)], times["fastlm"])
    return found["of_medians"] < 1 and found["quartiles"][1] < 1
