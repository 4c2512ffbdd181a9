# Two commands do all the set-up: `make course` runs the course, `make test` proves it. See README.md.
#   PROFILE=gpt2        the study's set-up instead of the embedded default
#   PYTHON=python3.12   another Python (3.10 or later)
#   TORCH_INDEX=ADDRESS index to take torch from, such as PyTorch's CPU-only one: pytorch.org, "Get started"
#   DPO_<SETTING>=…     any setting of the course, such as DPO_MAX_PAIRS=500
PROFILE ?= mini
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: course test lint unit notebooks lab regenerate clean
course: .venv/.course
	$(BIN)/python -m dpo_helpers course --profile $(PROFILE)

test: lint unit notebooks

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: .venv/.dev
	$(BIN)/pytest tests

# A fresh runs folder, so that nothing left by an earlier run is taken for a result.
notebooks: .venv/.dev
	rm -rf build/nbval-runs
	TQDM_DISABLE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error DPO_PROFILE=mini \
	  DPO_RUNS_DIR=$(CURDIR)/build/nbval-runs \
	  $(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout=900 notebooks

lab: .venv/.course
	$(BIN)/jupyter lab --ip=127.0.0.1 notebooks

# Execute the notebooks and keep the outputs in them; then read the differences before committing.
regenerate: .venv/.dev
	DPO_RUNS_DIR=$(CURDIR)/runs $(BIN)/python -m dpo_helpers course --profile mini --in-place

.venv/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than 3.10; use make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  echo "No GPU found: torch's default wheel on Linux may bring several GB of CUDA. If it does, stop and run"; \
	  echo "make $(MAKECMDGOALS) TORCH_INDEX=ADDRESS with PyTorch's CPU-only index (pytorch.org, Get started)."; fi
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

.venv/.course: .venv/.torch pyproject.toml
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.course
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build
