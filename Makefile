# The front door. Each target sets up what it needs in .venv, from Python, a C++ compiler and the
# package index; versions are in constraints.txt. (On Linux the index holds torch for CUDA, gigabytes
# of it: without a GPU, point pip at the index of CPU wheels that PyTorch's install page names.)
PYTHON ?= python3
RESULTS ?= bench/results
BIN := .venv/bin
CXX_FILES := $(filter-out %/rnn_fwd_cluster.cuh %/rnn_bwd_cluster.cuh, \
	$(shell find csrc tests bench -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h'))
# (those two stand as they were sketched)

OF_EVERY_LEVEL := tests/conformance/test_numerics.py
# SIMD levels under the address sanitizer, the best first.
LEVELS ?= 2

# What runs over the kernels for GPUs where there is none: Triton's in its interpreter, those in CUDA
# in the emulation.
OF_GPU := tests/gpu tests/conformance/test_backends.py tests/diagnose/test_gradient_flow.py $(addprefix tests/modules/test_, \
	memory_order.py module_contract.py module_sequences.py saved_tensors.py)

# Two processes, whose idle threads let go of the cores. BY_FILE: a file's fixtures are made once, for
# where no file is most of the work; in their order, so that the longest, with few tests, are not last.
# What is timed runs alone.
TIMED := tests/tools/test_speed.py
# The peer beside which lower levels are judged: MKL's products without AVX-512, too.
PEER_BELOW := MKL_ENABLE_INSTRUCTIONS=AVX2
PYTEST_IN_TWO := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2
BY_FILE := --dist loadfile --no-loadscope-reorder

ifneq ($(filter test prove,$(MAKECMDGOALS)),)
MAKEFLAGS += -j2  # what needs no package is compiled while pip unpacks
unexport MAKEFLAGS  # ninja would look for a jobserver
endif

.PHONY: demo test prove lint sanitize extension emulation wheel format bench \
	gpu-first gpu-probe gpu-check gpu-profile clean

# Kernels for GPUs take minutes to compile and are of no use without one. Compiled before pip installs
# the package, because pip shows nothing of it.
ifeq ($(wildcard /dev/nvidia[0-9]* /dev/dxg),)
demo: export RNNFAST_CUDA ?= 0
endif
demo: .venv/build  ## nn.RNN against rnnfast.RNN on handwritten digits
	@echo "Compiling the kernels: two minutes on two cores the first time, seconds after that"
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(MAKE) --no-print-directory .venv/demo
	$(BIN)/python -m rnnfast demo

# For people: minutes from a fresh clone. One SIMD level, no nvcc.
test prove: export RNNFAST_REQUIRE_EXTENSION = 1  # its tests must not be skipped
test: export RNNFAST_SIMD_LEVELS = native
test: export RNNFAST_CUDA = 0
test: lint extension  ## lint, and what fails first when something breaks
	$(PYTEST_IN_TWO) $(BY_FILE) -m "not proof" --ignore tests/proof --hypothesis-profile=small
	@echo "Left out: tests marked proof, other SIMD levels, the kernels for GPUs, sanitizers, planted"
	@echo "faults, more random cases. \`make prove\` runs them, in half an hour on two cores."

prove: export TRITON_CACHE_DIR = $(CURDIR)/build/triton
prove: export RNNFAST_CUDA_ARCHS = compute_90  # less than is installed: minutes matter here
prove: LEVELS = 1
prove: .venv/prove extension emulation sanitize  ## everything that can be shown without a GPU
	$(PYTEST_IN_TWO) $(BY_FILE) --hypothesis-profile=long --ignore $(TIMED)
	$(BIN)/python -m pytest $(TIMED)
	TRITON_INTERPRET=1 $(PYTEST_IN_TWO) $(BY_FILE) -k "triton or interpreted" tests/kernels/triton/interpreted $(OF_GPU)
	RNNFAST_EMULATION="$$($(BIN)/python tests/proof/emulation.py | tail -1)" \
		$(PYTEST_IN_TWO) -k "cuda or emulated" tests/kernels/cuda/emulated $(OF_GPU)
	levels=$$($(BIN)/python -c 'from rnnfast import _C; print(*_C.simd_levels()[:-1])') && \
		for level in $$levels; do echo "SIMD level $$level:" && \
		RNNFAST_SIMD=$$level $(PEER_BELOW) $(PYTEST_IN_TWO) -k "not reference" $(OF_EVERY_LEVEL) \
			|| exit 1; done
	@$(if $(shell command -v nvcc),,echo "Left out: there is no nvcc here, so the CUDA kernels were not compiled for GPUs.")

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

sanitize: extension  ## the C++ kernels under the address, undefined-behaviour and thread sanitizers
	$(BIN)/python tests/proof/sanitize.py --levels $(LEVELS)

# Where there is an nvcc, kernels that it does not compile are an error.
extension: .venv/dev  ## recompiles what has changed in csrc
	RNNFAST_REQUIRE_EXTENSION=1 RNNFAST_CUDA=$${RNNFAST_CUDA-$(if $(shell command -v nvcc),1)} \
		$(BIN)/python setup.py --quiet build_ext --inplace

emulation: .venv/build  ## the kernels in CUDA for the host: prints the module's file
	$(BIN)/python tests/proof/emulation.py

# On Linux under the manylinux tag that its libraries allow: an index takes no linux_x86_64.
wheel: .venv/prove  ## into dist/, with the CUDA kernels where nvcc is on the PATH
	rm -rf build/wheel
	RNNFAST_REQUIRE_EXTENSION=1 $(BIN)/python -m build --quiet --wheel --no-isolation --outdir build/wheel
ifeq ($(shell uname -s),Linux)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
else
	mkdir -p dist && cp build/wheel/*.whl dist
endif

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: .venv/bench extension  ## rnnfast.RNN against nn.RNN and jax.lax.scan, on an idle machine
	$(BIN)/python -m rnnfast bench --device cpu --out $(RESULTS)
	$(BIN)/python -m bench.options --out $(RESULTS)
	$(BIN)/python -m pytest bench/cases.py --benchmark-storage=build/benchmarks \
		--benchmark-autosave --benchmark-max-time=0.5 --benchmark-warmup=on \
		--benchmark-columns=median,iqr,rounds

gpu-first:  ## the first minutes on a GPU, the most valuable first, under 7 minutes; again: goes on
	$(PYTHON) -m bench.gpu_check.first --out $(RESULTS)

gpu-probe:  ## on a machine with an NVIDIA GPU, nvcc and torch: under 4 minutes
	$(PYTHON) -m bench.gpu_probe --out $(RESULTS)

gpu-check:  ## on a machine with an NVIDIA GPU: build, test, validate and time, under 9 minutes
	$(PYTHON) -m bench.gpu_check --out $(RESULTS)

gpu-profile:  ## there: ncu and compute-sanitizer over small workloads; KERNELS: part of a name
	$(PYTHON) -m bench.gpu_check.profile --out $(RESULTS)$(if $(KERNELS), --kernels $(KERNELS))

clean:
	rm -rf .venv build dist rnnfast.egg-info rnnfast/_C* rnnfast/_build.json .ruff_cache

# Without build isolation, so that the pins hold for the build as well and its objects are kept.
.venv/build: constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 ninja
	touch $@

.venv/demo .venv/dev .venv/prove .venv/bench: .venv/%: pyproject.toml .venv/build
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[$(EXTRAS_$*)]'
	touch $@

# One pip, and one build of the extension, after the other.
.venv/prove: .venv/dev
ifneq ($(filter prove,$(MAKECMDGOALS)),)
extension: .venv/prove
endif

.venv/bin/python:
	$(PYTHON) -m venv .venv

EXTRAS_demo := demo
EXTRAS_dev := dev
EXTRAS_prove := demo,dev,prove
EXTRAS_bench := demo,dev,prove,bench
