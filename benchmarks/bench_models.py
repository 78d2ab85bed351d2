"""The training steps of `fastlm bench`, one benchmark per side, through pytest-benchmark."""

import pytest

from fastlm.bench.models import MODELS, STRESS, row


@pytest.mark.parametrize("gpt", [*MODELS, *STRESS], ids=lambda gpt: gpt.name)
@pytest.mark.parametrize("side", ["eager", "compile", "fastlm"])
def bench_training_step(benchmark, gpt, side):
    wanted = ([], [None]) if side == "fastlm" else ([side], [])
    benchmark.pedantic(row(gpt, "cpu", *wanted).steps[side], rounds=3, warmup_rounds=1)
