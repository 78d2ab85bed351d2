"""fastlm.cpu.reuse_memory(): each test in a process of its own, since it cannot be undone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRELUDE = """
import gc, os, random, threading
import torch
from fastlm import cpu, ops

MB = 1 << 20

def megabytes(n, value=0.0):
    return torch.full((int(n * MB) // 4,), value)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

"""


def _said(code: str) -> str:
    """What a process that runs `code` prints; it must end well."""
    command = [sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Exception" not in done.stderr, done.stderr
    return done.stdout


def test_memory_of_a_freed_tensor_serves_the_next_one():
    _said("""
assert cpu.memory_statistics() == (False, 0, 0, 0, 0, 0) and cpu.trim() == 0
cpu.reuse_memory(100 * MB)
x = megabytes(8)
address = x.data_ptr()
assert address % 64 == 0
assert cpu.memory_statistics() == (True, 100 * MB, 0, 8 * MB, 0, 1)
del x
assert cpu.memory_statistics() == (True, 100 * MB, 8 * MB, 0, 0, 1)
x = megabytes(7.9)  # the same size class
assert x.data_ptr() == address
assert cpu.memory_statistics() == (True, 100 * MB, 0, 8 * MB, 1, 1)
small = torch.ones(100)
assert cpu.memory_statistics().misses == 1
""")


def test_trim_returns_memory_to_the_system():
    _said("""
cpu.reuse_memory()
x = megabytes(256, 1.0)
before = resident()
del x
assert resident() > before - 16 * MB  # kept
assert cpu.trim() == 256 * MB
assert resident() < before - 240 * MB
assert cpu.memory_statistics().idle == 0 and cpu.trim() == 0
""")


def test_limit_holds_and_the_longest_idle_goes_first():
    _said("""
cpu.reuse_memory(10 * MB)
old, new, big = megabytes(4), megabytes(5), megabytes(11)
where = new.data_ptr()
del old, new
assert cpu.memory_statistics().idle == 9 * MB
del big  # above the limit alone: not kept, and nothing makes room for it
assert cpu.memory_statistics().idle == 9 * MB
x = megabytes(2)
del x  # 11 MB would lie idle: the 4 MB of `old` go
assert cpu.memory_statistics().idle == 7 * MB
assert megabytes(5).data_ptr() == where
cpu.reuse_memory(6 * MB)  # what was idle longest is the 2 MB block
assert cpu.memory_statistics().idle == 5 * MB
cpu.reuse_memory(0)
assert cpu.memory_statistics().idle == 0
""")


def test_growth_is_bounded_over_random_sizes():
    _said("""
limit = 64 * MB
cpu.reuse_memory(limit)
random.seed(0)
start, most, alive = resident(), 0, []
for _ in range(1500):
    alive.append(megabytes(random.uniform(0.2, 8)))
    if len(alive) > 4:
        del alive[random.randrange(5)]
    found = cpu.memory_statistics()
    wanted = sum(4 * t.numel() for t in alive if 4 * t.numel() >= 256 << 10)
    assert found.idle <= limit and wanted <= found.in_use <= 1.126 * wanted + 4096, (found, wanted)
    most = max(most, resident())
assert found.hits > 200, found
assert most < start + 1.126 * 5 * 8 * MB + limit + 40 * MB, (start, most)
""")


def test_threads_allocate_and_free_each_others_tensors():
    _said("""
cpu.reuse_memory(256 * MB)
shelf, failures = [None] * 8, []

def work(seed):
    numbers = random.Random(seed)
    for i in range(300):
        value = float(seed * 1000 + i)
        mine = megabytes(numbers.uniform(0.3, 3), value)
        place = numbers.randrange(8)
        shelf[place], other = mine, shelf[place]
        if not (mine == value).all() or other is not None and not (other == other[0]).all():
            failures.append(seed)
        if i % 50 == 0:
            cpu.trim()
            cpu.reuse_memory(numbers.randrange(256 * MB))

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert not failures
shelf.clear()
gc.collect()
assert cpu.memory_statistics().in_use == 0
""")


@pytest.mark.parametrize("flags", ["-O1", "-O1 -fsanitize=thread"])
def test_every_lock_is_held_when_threads_and_forks_meet(tmp_path, flags):
    """The cache alone, with no interpreter's lock around it: a lock that is missing is seen for certain."""
    probe, source = tmp_path / "probe", ROOT / "tests/native/block_cache_probe.cpp"
    build = subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++20", "-pthread", *flags.split(), source, "-o", probe],
        capture_output=True,
        text=True,
    )
    if "tsan" in build.stderr:
        pytest.skip("this compiler has no thread sanitizer")
    assert build.returncode == 0, build.stderr
    environment = os.environ | {"TSAN_OPTIONS": "die_after_fork=0"}
    done = subprocess.run([probe], capture_output=True, text=True, timeout=120, env=environment)
    if "FATAL: ThreadSanitizer" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this system")
    assert done.returncode == 0, done.stderr


def test_forked_child_allocates_frees_and_exits_and_the_parent_goes_on():
    said = _said("""
torch.set_num_threads(1)  # a child may not use the parent's OpenMP threads
cpu.reuse_memory()
kept = megabytes(8, 3.0)
idle = megabytes(16, 1.0); del idle
stop = False

def busy():
    while not stop:
        megabytes(0.5)

other = threading.Thread(target=busy, daemon=True)  # so that a failure ends the process
other.start()
for _ in range(20):  # while another thread holds the lock now and then
    child = os.fork()
    if child == 0:
        try:
            x = megabytes(4)
            assert cpu.memory_statistics().idle < 2 * MB  # the parent's idle blocks are not the child's
            x = megabytes(16, 2.0)
            del x
            x = megabytes(16, 2.0)
            assert cpu.memory_statistics().hits > 0 and (x == 2).all() and (kept == 3).all()
            kept.fill_(4.0)
            del x, kept
            cpu.trim()
            os._exit(0)
        finally:
            os._exit(1)  # an assertion that failed
    assert os.waitpid(child, 0)[1] == 0
stop = True
other.join()
assert (kept == 3).all()
hits = cpu.memory_statistics().hits
megabytes(16)
assert cpu.memory_statistics().hits == hits + 1
print("parent ends")
""")
    assert said == "parent ends\n"


def test_data_loader_workers_run():
    _said("""
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return megabytes(1, float(i)) + megabytes(1, 1.0)

cpu.reuse_memory()
loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork")
assert [batch[0, 0].item() for batch in loader] == [1.0, 3.0, 5.0, 7.0]
""")


def test_tensors_outlive_whoever_made_them():
    _said("""
before = megabytes(4, 1.0)
view = megabytes(4, 2.0).numpy()
packed = torch.randn(512, 1024).to_mkldnn()  # oneDNN frees it through the allocator of the day
cpu.reuse_memory(64 * MB)
packed.to_dense(); del packed
packed = torch.randn(512, 1024).to_mkldnn(); del packed
in_use = cpu.memory_statistics().in_use

array = megabytes(4, 3.0).numpy()
megabytes(4, 9.0)
assert (array == 3).all() and (view == 2).all()
del array, view

grown = megabytes(1, 4.0)
grown.untyped_storage().resize_(8 * MB)
assert (grown == 4).all() and grown.untyped_storage().nbytes() == 8 * MB
before.untyped_storage().resize_(8 * MB)
assert (before == 1).all()

shared = megabytes(2, 5.0).share_memory_()
lazy = torch._lazy_clone(grown)
lazy.fill_(6.0)
assert (shared == 5).all() and (grown == 4).all() and (lazy == 6).all()
del shared, grown, lazy, before
gc.collect()
assert cpu.memory_statistics().in_use == in_use

x = megabytes(4, 7.0).requires_grad_()
(x * x).sum().backward()  # another thread frees what forward kept
assert (x.grad == 14).all()
""")


def test_tensors_may_live_until_the_interpreter_ends():
    said = _said("""
early = megabytes(4, 1.0)
cpu.reuse_memory()
late, view = megabytes(4, 2.0), megabytes(4, 3.0).numpy()

class Last:
    def __init__(self): self.tensor = megabytes(4, 5.0)
    def __del__(self): print(self.tensor.sum().item() > 0, flush=True)

last = Last()
torch.kept = [megabytes(4, 4.0)]
threading.Thread(target=lambda: setattr(torch, "made_elsewhere", megabytes(4))).start()
""")
    assert said == "True\n"


def test_memory_that_does_not_fit_is_torchs_error_and_idle_memory_is_given_up_first():
    _said("""
import resource
cpu.reuse_memory()
x = megabytes(256); del x
assert cpu.memory_statistics().idle == 256 * MB
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + 128 * MB, resource.RLIM_INFINITY))
fits = megabytes(300)  # only where the idle blocks went first
assert cpu.memory_statistics().idle == 0
for bytes_ in (1 << 40, 1 << 62):
    try:
        torch.empty(bytes_, dtype=torch.uint8)
    except RuntimeError as error:
        assert "can't allocate memory" in str(error), error
    else:
        raise AssertionError("allocated")
assert fits[-1] == 0
""")


def test_results_are_the_same_and_the_profiler_sees_every_byte():
    _said("""
def step():
    torch.manual_seed(0)
    x, w = torch.randn(1024, 768, requires_grad=True), torch.randn(768, requires_grad=True)
    y, h = ops.layer_norm(x, w, residual=x, dropout_p=0.1, seed=1)
    z = ops.bias_act(y, w) + ops.softmax(h, causal=False)
    return z.detach(), *torch.autograd.grad(z.square().sum(), (x, w))

def profiled():
    with torch.profiler.profile(profile_memory=True) as seen:
        megabytes(4)
    return [e.self_cpu_memory_usage for e in seen.key_averages() if "full" in e.key or "empty" in e.key]

wanted, bytes_ = step(), profiled()
cpu.reuse_memory()
for _ in range(3):
    assert all(torch.equal(a, b) for a, b in zip(step(), wanted))
assert cpu.memory_statistics().hits > 10
assert profiled() == bytes_
""")
