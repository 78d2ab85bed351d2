"""The mutation tool on CUDA kernels: which comparisons it flips, that a flip is made, and what is caught."""

import pytest
import torch

from fastlm.testing.cases import cases_of
from fastlm.testing.mutate import cuda as mutate_cuda
from fastlm.testing.mutate import cuda_source, ptx
from fastlm.testing.mutate.cuda import CudaKernels, stable, told
from fastlm.testing.mutate.job import CAUGHT, Job, groups_of
from fastlm.testing.mutate.points import SAME, Point
from fastlm.testing.mutate.state import State
from fastlm.testing.ptxsim import cuda_build

SOURCE = """
// if (a < b) is a comment
template <class T, int kWidth>
__global__ void __launch_bounds__(kMost<T, (kWidth > 1)>) copy_kernel(const T* x, int n, T* y) {
  if constexpr (kWidth == 1) n = x[0] <= 1 ? n : 0;
  static_assert(kWidth < 9, "a < b");
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (threadIdx.x + i < n && y != nullptr) y[i] = x[i] >> 1;
  }
  for (int i = 0; i <
                  n;
       ++i) {
  }
}

constexpr int two(int n) { return n > 2 ? 2 : n; }

void launch(int n) {
  if (n == 0) return;
}
"""


@pytest.fixture(scope="module")
def kernels():
    return CudaKernels("softmax", "sm_80")


@pytest.fixture(scope="module")
def point(kernels):
    case = next(c for c in cases_of("softmax")[0] if c.name == "wide")
    made = Point("softmax", case, torch.float16, "sm_80", "cuda", kernels.program)
    assert made.baseline() is None
    return made


def test_comparisons_of_device_code_at_run_time_are_changed_and_no_others(tmp_path):
    file = tmp_path / "copy.cu"
    file.write_text(SOURCE)
    found = cuda_source.comparisons(file)
    assert [c.what for c in found] == [
        "x[0] <= 1 -> x[0] < 1",
        "threadIdx.x + i < n -> threadIdx.x + i <= n",
        "y != nullptr -> y == nullptr",
        "i < n -> i <= n",
    ]
    assert {c.function for c in found} == {"copy_kernel"} and len({c.number for c in found}) == 4
    assert [c.line for c in found] == [5, 9, 9, 11]
    assert cuda_source.flipped(found[0]) == SOURCE.replace("x[0] <= 1", "x[0] < 1")
    assert f"y != Flip<{found[2].number}u>() != nullptr" in cuda_source.behind_numbers(file)


def test_names_do_not_change_with_their_file():
    name = "_ZN6fastlm46_GLOBAL__N__{}_13_layer_norm_cu_{}25layer_norm_forward_kernelI6__halfLi8EEEvNS_1AE"
    one, two = name.format("63688d74", "fcf61043"), name.format("00ab34cd", "12345678")
    assert one != two and stable(one) == stable(two)
    assert told(one) == "layer_norm_forward_kernel"
    assert told("_ZN6fastlm19add_partials_kernelEPKflllPf") == "add_partials_kernel"


def test_a_barrier_is_told_by_its_line_and_its_loss_is_caught(kernels, point):
    group = next(g for g in groups_of([point], kernels.paths()) if g.kernel == "softmax_forward_kernel")
    assert {group.line(site.source)[:15] for site in group.sites.values()} == {"__syncthreads()"}
    verdicts = []
    for at, site in group.sites.items():
        for change in ptx.changes(site):
            verdicts.append(point.rewritten(group.rewrite(at, change)))
    assert verdicts and all("race" in str(v) for v in verdicts)  # of_warps is read behind each


def one(file, words):
    made = cuda_source.comparisons(cuda_build.CSRC / "cuda" / file)
    return next(c for c in made if c.what.startswith(words))


@pytest.mark.slow  # compiles
def test_a_flip_behind_its_number_and_one_in_the_source_are_both_caught(kernels, point):
    mutants = {(m.line, m.what): m for m in kernels.mutants([point])}
    wanted = one("softmax.cu", "total == 0 ->")
    for stage in mutants[wanted.line, wanted.what].stages:
        with stage() as wrong:
            assert wrong(point) is not None
    assert point.wrong() is None  # all is as before


def test_what_a_kernel_does_not_have_is_no_mutant_of_it(kernels, point):
    found = {(m.file.rpartition("/")[2], m.line) for m in kernels.mutants([point])}
    assert ("rows.cuh", one("rows.cuh", "item < left").line) in found
    assert not any(file in ("layer_norm.cu", "sums.cuh") for file, _ in found)


def test_a_change_that_leaves_the_code_of_a_point_is_told_apart(kernels, point):
    other = one("softmax.cu", "start < n ->")  # of a row too long for a block's registers
    with kernels._alone(other, [point], set()) as wrong:
        assert wrong(point) == SAME


def test_a_point_is_not_asked_about_what_its_threads_do_not_come_to(kernels, point, monkeypatch):
    of_masks, of_sums = one("softmax.cu", "d < mask.dims ->"), one("softmax.cu", "total == 0 ->")
    present, reached = (numbers[point.name] for numbers in kernels._numbers([point]))
    assert {of_masks.number, of_sums.number} <= present
    assert of_masks.number not in reached and of_sums.number in reached
    mutant = next(m for m in kernels.mutants([point]) if (m.line, m.what) == (of_masks.line, of_masks.what))
    monkeypatch.setattr(point, "wrong", lambda: pytest.fail("asked"))
    monkeypatch.setattr(point, "ran", lambda: pytest.fail("asked"))
    for stage in mutant.stages:
        with stage() as wrong:
            assert wrong(point) is None


def test_what_has_been_tried_is_not_tried_again(kernels, point, tmp_path, monkeypatch):
    only = one("softmax.cu", "total == 0 ->")
    monkeypatch.setattr(cuda_source, "comparisons", lambda file: (only,) if file == only.file else ())

    def tried(say):
        job = Job("softmax", "sm_80", State(tmp_path / "state.json"), say, lambda op, arch: kernels)
        job.points = [point]
        job.run("source")
        return [r["verdict"] for r in job.state.records.values()]

    assert tried(str) == [CAUGHT]
    assert tried(lambda text: pytest.fail(f"tried again: {text}")) == [CAUGHT]


def test_a_search_among_the_numbers_of_flips_is_refused():
    equal = b"mov.u32 \t%r1, %envreg0;\nsetp.eq.s32 \t%p1, %r1, 1234567;\n@%p1 bra $L1;\nmov.u32 %r11, 0;\n"
    mutate_cuda._refuse_jumps(equal)
    with pytest.raises(RuntimeError, match=r"used otherwise: setp.lt.s32 %p2, %r1, 1300000;"):
        mutate_cuda._refuse_jumps(equal + b"setp.lt.s32 %p2, %r1, 1300000;\n")
