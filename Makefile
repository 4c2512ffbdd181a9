# Two commands do all the set-up: `make course` runs the course, `make test` proves it. See README.md.
#   PROFILE=gpt2        the study's set-up instead of the embedded default
#   BEYOND=1            the optional notebooks of notebooks/beyond/ too
#   PYTHON=python3.12   another Python (3.10 or later)
#   TORCH_INDEX=ADDRESS index to take torch from, such as PyTorch's CPU-only one: pytorch.org, "Get started"
#   DPO_<SETTING>=…     any setting of the course, such as DPO_MAX_PAIRS=500
PROFILE ?= mini
PYTHON ?= python3
TORCH_INDEX ?=
BEYOND ?=
# Recipes read these from the environment: whatever is in them, neither make nor a shell runs it.
GIVEN := PROFILE PYTHON TORCH_INDEX BEYOND $(filter DPO_%,$(.VARIABLES))
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
export PROFILE PYTHON TORCH_INDEX
BIN := .venv/bin
INSTALL := -m pip install -q --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL) -c constraints.txt
TOOLS := build/tools/bin
RESOLVE := $(TOOLS)/uv pip compile -q --universal --python-version 3.10 --only-binary :all: --no-annotate --no-header
QUIET := TQDM_DISABLE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

.PHONY: course help test lint unit notebooks test-browser lab regenerate site links lock floors audit licences clean
course: .venv/.course  ## set-up, all seven notebooks and the report
	$(BIN)/python -m dpo_helpers course --profile "$$PROFILE" $(if $(BEYOND),--beyond)

help:  ## this list
	@awk -F ' *:.*## ' '/^[a-z-]+:.*## / {printf "make %-14s%s\n", $$1, $$2}' Makefile
	@sed -n 's/^#   /  /p' Makefile

test: lint unit notebooks  ## set-up, lint, types, unit tests and the notebooks' outputs

lint: .venv/.dev  ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread per test process: the models of most tests are too small for two.
unit: .venv/.dev  ## the unit tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder tests

# First a run of all stages in a fresh folder, so that nothing left by an earlier one is taken for a result; then the
# notebooks on that run, side by side, their outputs compared strictly.
notebooks: .venv/.dev  ## the notebooks, their outputs compared strictly
	rm -rf build/nbval-runs
	$(QUIET) $(BIN)/python -m dpo_helpers all --profile mini --runs-dir build/nbval-runs
	$(QUIET) OMP_NUM_THREADS=1 DPO_PROFILE=mini DPO_RUNS_DIR="$$PWD/build/nbval-runs" \
	  $(BIN)/pytest -n auto --maxprocesses 4 --dist loadscope --nbval --nbval-current-env --nbval-cell-timeout=900 \
	  notebooks/[0-9]*.ipynb notebooks/beyond/*.ipynb

# What a reader does, in headless Chromium: run notebooks 4 and 5 in JupyterLab, move the sliders; read the site.
test-browser: .venv/.dev  ## notebooks and site in headless Chromium
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/browser

lab: .venv/.course  ## the notebooks in JupyterLab, on this machine only
	$(BIN)/jupyter lab --ip=127.0.0.1 notebooks

# Execute the notebooks and keep the outputs in them; then read the differences before committing.
regenerate: .venv/.dev  ## execute the notebooks and keep the outputs in them
	$(BIN)/python -m dpo_helpers lesson
	DPO_RUNS_DIR="$$PWD/runs" $(BIN)/python -m dpo_helpers course --profile mini --in-place --beyond
	cp runs/mini/figures/06-frontier.png docs/frontier.png

# The notebooks as pages that need no network, neither to build nor to read: open build/site/index.html in a browser.
site: .venv/.dev  ## the notebooks as pages: build/site/index.html
	$(BIN)/python docs/build_site.py

# Optional, and needs a network: does every other site that the notebooks link to answer?
links: .venv/.dev  ## do the sites answer that the notebooks link to?
	$(BIN)/python docs/build_site.py --links

# Optional, with tools of their own. The first: resolve constraints.txt, keeping what still fits. Beside it, for who keeps
# an index of their own: build/requirements-hashed.txt, the sha256 of each wheel, for pip install --require-hashes -r.
lock: build/tools/.made  ## resolve constraints.txt
	echo torch==2.13.0 > build/torch.txt
	$(RESOLVE) pyproject.toml --all-extras -c build/torch.txt -o constraints.txt
	$(RESOLVE) constraints.txt --no-deps --generate-hashes -o build/requirements-hashed.txt

# Do the oldest versions that pyproject.toml allows still work? Their own environment; test_supply.py is about the pins.
# UV_TORCH_BACKEND=cpu in the environment takes torch without CUDA. The second install: what the tests need besides.
floors: build/tools/.made  ## the tests on the oldest versions that are allowed
	$(TOOLS)/uv venv -q --clear -p "$$PYTHON" build/floors
	$(TOOLS)/uv pip install -q -p build/floors --only-binary :all: --resolution lowest-direct -e '.[gguf]'
	$(TOOLS)/uv pip install -q -p build/floors hypothesis pytest-xdist
	build/floors/bin/python -m dpo_helpers versions
	OMP_NUM_THREADS=1 build/floors/bin/pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder \
	  -m "not slow" --ignore tests/faults/test_supply.py tests

# Known holes in the pins that this Python and system take. --strict: a package that the service does not know fails.
audit: build/tools/.made  ## known holes in the pinned versions
	@rm -f build/audit.txt
	@$(TOOLS)/pip-audit --strict --disable-pip --no-deps -r constraints.txt --progress-spinner off -o build/audit.txt \
	    2> build/audit.log && echo "audit: no known holes in the pinned versions" || { \
	  if [ -s build/audit.txt ]; then cat build/audit.txt; echo "audit: these pinned versions have known holes"; \
	  else tail -n 1 build/audit.log; echo "audit: nothing was audited: the advisory service of PyPI cannot be reached" \
	    "from here, or does not know the package above; try again where it can be"; fi >&2; exit 1; }

# The table at the end of LICENSES.md, of what is installed here.
licences: .venv/.dev build/tools/.made  ## the table at the end of LICENSES.md
	$(TOOLS)/pip-licenses --python=$(BIN)/python --with-system --format=markdown --ignore-packages dpo-helpers pip \
	  --output-file=build/licences.txt
	sed '/^| Name/,$$d' LICENSES.md > build/LICENSES.md
	tr -s ' -' < build/licences.txt >> build/LICENSES.md
	mv build/LICENSES.md LICENSES.md

build/tools/.made:
	"$$PYTHON" -m venv build/tools
	$(TOOLS)/python $(INSTALL) 'uv>=0.8' 'pip-audit>=2.9' 'pip-licenses>=5'
	@touch $@

# Metadata of an earlier install in the folder itself would be read before that in .venv.
.venv/.torch: constraints.txt
	@"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $$PYTHON is older than 3.10; use make PYTHON=..." >&2; exit 2; }
	"$$PYTHON" -m venv .venv
	rm -rf dpo_helpers.egg-info
	@if [ -z "$$TORCH_INDEX" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  echo "No GPU found: torch's default wheel on Linux may bring several GB of CUDA. If it does, stop and run the"; \
	  echo "same with TORCH_INDEX=ADDRESS, PyTorch's CPU-only index (pytorch.org, Get started)."; \
	fi
	$(PIP) $${TORCH_INDEX:+--index-url "$$TORCH_INDEX"} torch
	@touch $@

.venv/.course: .venv/.torch pyproject.toml
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.course
	$(PIP) -e '.[dev,site]'
	@touch $@

clean:  ## remove .venv and build
	rm -rf .venv build
