# make setup: the environment, built. make demo: the main job. make test: the tests. Each does its own set-up.
VENV := .venv
PYTHON := $(VENV)/bin/python
TORCH ?= 2.13.0
PIP := $(PYTHON) -m pip -qq --disable-pip-version-check
NATIVE := $(wildcard csrc/*.h csrc/*.py csrc/*/*.cpp csrc/*/*.h csrc/cuda/*) setup.py pyproject.toml
C_SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/native/*.cu)
# nvcc 13.0, where none is on the PATH: the tests compile csrc/cuda with it, for the simulator.
NVCC_WHEELS := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85

# A torch with CUDA, several GB: only test-cuda-build installs it, in an environment of its own.
CUDA_TORCH := 2.14.1
CUDA_VENV := .venv-cuda

.PHONY: setup demo test test-slow test-gpu-model test-cuda-build bars mutate bench gpu lint format sanitize clean

setup: $(VENV)/built

$(VENV)/created:
	@command -v python3 >/dev/null || { echo "fastlm needs Python >= 3.10: apt-get install python3-venv python3-dev"; exit 1; }
	@echo "Creating $(VENV)"
	@python3 -m venv $(VENV) || { echo "fastlm needs python3-venv: apt-get install python3-venv python3-dev"; exit 1; }
	@touch $@

$(VENV)/torch-$(TORCH): pyproject.toml requirements.txt | $(VENV)/created
	@echo "Installing torch $(TORCH) and the pinned requirements"
	@$(PIP) install "torch==$(TORCH)" -r requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/torch-$(TORCH) $(NATIVE)
	@echo "Building the native kernels"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/nvcc: | $(VENV)/created
	@command -v nvcc >/dev/null || { echo "Installing nvcc"; $(PIP) install $(NVCC_WHEELS); }
	@touch $@

demo: setup
	@$(VENV)/bin/fastlm demo $(ARGS)

test: setup $(VENV)/nvcc
	@$(PYTHON) -m pytest -n 2 -m "not slow and not gpu_model" $(ARGS)

test-slow: setup $(VENV)/nvcc
	@$(PYTHON) -m pytest -n 2 -m slow $(ARGS)

# Every case of every GPU kernel on every simulated architecture.
test-gpu-model: setup $(VENV)/nvcc
	@$(PYTHON) -m pytest -n 2 -m "gpu_model" $(ARGS)

# Installs fastlm against a CUDA build of torch for four architectures, and looks at what was built; needs no GPU.
# Twenty minutes on 2 cores.
test-cuda-build:
	@$(MAKE) --no-print-directory VENV=$(CUDA_VENV) TORCH=$(CUDA_TORCH) $(CUDA_VENV)/torch-$(CUDA_TORCH) $(CUDA_VENV)/nvcc
	@echo "Building fastlm for sm_80, sm_90, sm_100 and sm_120"
	@TORCH_CUDA_ARCH_LIST="8.0 9.0 10.0 12.0" $(CUDA_VENV)/bin/python -m pip -qq install --no-deps --no-build-isolation .
	@$(CUDA_VENV)/bin/pytest -p no:cacheprovider tests/test_cuda_build.py $(ARGS)

# What the GPU kernels compile to, stored as limits, and its tables. make bars ARGS="--op attention": one op's.
bars: setup $(VENV)/nvcc
	@$(PYTHON) -m fastlm.testing.static_bars tests/static_bars.json --docs docs/evidence.md $(ARGS)
	@$(PYTHON) -m fastlm.testing.static_bars tests/static_bars_cuda.json --backend cuda \
	  --beside tests/static_bars.json --docs docs/cuda.md $(ARGS)
	@$(PYTHON) -m fastlm.testing.static_bars.compared --docs docs/cuda.md

# Breaks the Triton kernels, one change at a time: do the cases see it? Hours; a run that was stopped goes on.
# make mutate ARGS="--op layer_norm" takes minutes; ARGS="--backend cuda": the CUDA kernels.
mutate: setup $(VENV)/nvcc
	@$(PYTHON) -m fastlm.testing.mutate --json benchmarks/results $(ARGS)

# Everything, about half an hour: results, plots, and the table of the page. make bench ARGS=--quick: less.
bench: setup
	@$(VENV)/bin/fastlm bench --all --json benchmarks/results --plot docs/images --docs docs/benchmarks.md $(ARGS)

# All tests and benchmarks on this machine's NVIDIA GPU, unattended, within ten minutes; results and pictures in
# benchmarks/results. make gpu PYTHON=python3: with that Python's torch and triton. Without a GPU: status 3.
gpu:
	@python3 benchmarks/gpu.py $(if $(filter command,$(origin PYTHON)),--python $(PYTHON)) $(ARGS)

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(C_SOURCES)

format: setup
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/clang-format -i $(C_SOURCES)

# The CPU cases under AddressSanitizer and UndefinedBehaviourSanitizer, in a build of their own, for this
# machine's instruction set.
SANITIZED := build/sanitize/lib
sanitize: setup
	@FASTLM_ONLY_ISA="$$($(PYTHON) -c 'from fastlm import _load; print(_load.ISA)')" \
	  CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
	  $(PYTHON) setup.py -q build --build-lib $(SANITIZED)
	@cd $(SANITIZED) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(CURDIR)/$(PYTHON) $(CURDIR)/tests/run_cases.py

clean:
	@rm -rf $(VENV) $(CUDA_VENV) build *.egg-info fastlm/*.so fastlm/_build.json
