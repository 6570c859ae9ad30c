# make quickstart   a quantized model end to end, in its own virtual environment (.venv)
# make test         lint and every test that needs no GPU
# make gpu-check    on a CUDA machine: every kernel checked and timed, models, other libraries, in five minutes (docs/kernels.md);
#                   with the active Python, nothing is installed: rows, a summary and a plot in benchmarks/results, or OUT
# make gpu-test     the tests that need a GPU, with the active Python
# make fuzz         damaged checkpoints, kills while saving, damaged kernel caches and forks: JSON summaries (docs/reliability.md)
# make fuzz-loads, fuzz-kills, fuzz-cache   its parts
# make lint, wheel, clean
#
# Variables:
#   PYTHON  the interpreter that creates .venv (at least 3.11)
#   TORCH   what pip installs when .venv has no torch yet, e.g. make quickstart TORCH=torch for the newest
#   PY      the interpreter of gpu-check and gpu-test
#   WORKERS processes among which `make test` distributes the test files; 0: no additional process
#   COUNT, KILLS, CACHES   of `make fuzz`: damaged loads, kills, damaged caches and as many forks
#   SEED, MINUTES, JOBS    of `make fuzz`: the first seed, the longest time of each part, processes that load
#   OUT     of `make fuzz`: folder for the summaries, fuzz.json, kills.json and fuzz_cache.json; of gpu-check: for all it writes
#   ARGS    further arguments: for pytest in `make test` and `gpu-test`, for the program in `make quickstart`, `gpu-check` ...

PYTHON ?= python3
PY ?= python3
# The tests were run with the CPU build of exactly this version; pip's configuration decides from where it is installed.
TORCH ?= torch==2.13.0
ARGS ?=
COUNT ?= 1000
SEED ?= 0
MINUTES ?= 10
JOBS ?= 1
KILLS ?= 50
CACHES ?= 40
OUT ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

.PHONY: help quickstart test fuzz fuzz-loads fuzz-kills fuzz-cache lint gpu-check gpu-test wheel clean

help:
	@sed -n '/^PYTHON/q; s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart.py $(ARGS)

# OMP_WAIT_POLICY=passive: idle threads sleep. Two workers with two threads each would otherwise spin most of the time on two cores.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests integration_tests -m "not gpu" -n $(WORKERS) --dist loadfile $(ARGS)

# All three run, even if one finds a fault.
fuzz:
	@failed=; for part in fuzz-loads fuzz-kills fuzz-cache; do $(MAKE) $$part || failed="$$failed $$part"; done; \
		test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

FUZZ = OMP_NUM_THREADS=1 PYTHONPATH=src:kernels $(BIN)/python tests/fuzz
FUZZ_ARGS = --seed $(SEED) --minutes $(MINUTES) $(if $(OUT),--out $(OUT)/$(1).json) $(ARGS)

# One seed again: make fuzz-loads ARGS="--only 4711"
fuzz-loads: $(VENV)/.test
	$(FUZZ)/run.py --count $(COUNT) --jobs $(JOBS) $(call FUZZ_ARGS,fuzz)

fuzz-kills: $(VENV)/.test
	$(FUZZ)/kills.py --count $(KILLS) $(call FUZZ_ARGS,kills)

fuzz-cache: $(VENV)/.test
	$(FUZZ)/fuzz_cache.py --count $(CACHES) --forks $(CACHES) $(call FUZZ_ARGS,fuzz_cache)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu-check:
	PYTHONPATH=src:kernels:benchmarks $(PY) -m gpu_check $(if $(OUT),--out $(OUT)) $(ARGS)

# Most of the time is spent compiling kernels: with pytest-xdist it is distributed among processes.
gpu-test:
	PYTHONPATH=src:kernels $(PY) -m pytest -m gpu tests/kernels/test_gpu.py tests/linear/test_triton_gpu.py tests/linear/test_values_gpu.py \
		$$($(PY) -c 'import xdist; print("-n 8")' 2>/dev/null) $(ARGS)

# build/ is removed first: setuptools packs what an earlier build left there, also files that were deleted from the checkout.
wheel: $(VENV)/.torch
	rm -rf build
	$(PIP) wheel . --no-deps --wheel-dir dist

clean:
	rm -rf build dist quickstart-out src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# Each step of the installation creates a stamp file, so that a second call does nothing.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Requanto needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) -V 2>&1`. Choose another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# Torch is installed first and alone: as another package's dependency pip would choose the newest build with CUDA libraries.
$(VENV)/.torch: $(VENV)/.python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install "$(TORCH)"
	touch $@

$(VENV)/.quickstart: pyproject.toml $(VENV)/.torch
	$(PIP) install -e ".[quickstart]"
	touch $@

# The tests compare with optimum-quanto. Of its dependencies only ninja is missing, which compiles its C++ code at first
# use.
$(VENV)/.test: pyproject.toml tests/formats.txt $(VENV)/.torch
	$(PIP) install -e ".[test]"
	$(PIP) install ninja
	$(PIP) install --no-deps optimum-quanto==0.2.7
	$(PIP) install --no-deps --upgrade --target $(VENV)/formats -r tests/formats.txt
	touch $@ $(VENV)/.quickstart
