# The front door. Each target sets up what it needs; nothing needs a virtual environment of yours.
PYTHON ?= python3
RESULTS ?= bench/results
BIN := .venv/bin
CUDA := $(filter-out %/rnn_fwd_cluster.cuh %/rnn_bwd_cluster.cuh, \
	$(shell git ls-files '*.cu' '*.cuh' '*.h'))  # those two stand as they were sketched

.PHONY: test lint format gpu-probe clean

test: lint  ## everything that can be shown without a GPU
	$(BIN)/python -m pytest

lint: .venv/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CUDA)

format: .venv/made
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CUDA)

gpu-probe:  ## on a machine with an NVIDIA GPU, nvcc and torch: under 4 minutes
	$(PYTHON) -m bench.gpu_probe --out $(RESULTS)

clean:
	rm -rf .venv build .ruff_cache

.venv/made: requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@
