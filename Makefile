# Everything starts from a Python (>= 3.11) and make: the first target builds $(VENV) once.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Processes that share the ordinary tests; 0 runs them in one, as a debugger needs.
JOBS   ?= 2

BIN   := $(VENV)/bin
STAMP := $(VENV)/.flatmin-installed

# The frameworks and all that they bring stay out of the environment for everything else.
FRAMEWORKS_VENV  ?= $(VENV)-frameworks
FRAMEWORKS_STAMP := $(FRAMEWORKS_VENV)/.flatmin-installed

# So do timm and torchvision: an installed torchvision that does not match its torch breaks other packages' imports.
VISION_VENV  ?= $(VENV)-vision
VISION_STAMP := $(VISION_VENV)/.flatmin-installed

# And so do the trackers: Trackio wants another Pillow than the tests of images, so that one pin is left out.
TRACKERS_VENV  ?= $(VENV)-trackers
TRACKERS_STAMP := $(TRACKERS_VENV)/.flatmin-installed

# Ray alone is as large as everything else together.
EXECUTORS_VENV  ?= $(VENV)-executors
EXECUTORS_STAMP := $(EXECUTORS_VENV)/.flatmin-installed

RELEASE_VENV  ?= $(VENV)-release
RELEASE_STAMP := $(RELEASE_VENV)/.flatmin-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo docs generate test test-all test-frameworks test-vision test-trackers test-executors mutants lint types bench release-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(0 if v >= (3, 11) else f"flatmin needs Python 3.11 or newer, but $(PYTHON) is {v[0]}.{v[1]}; run make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || { echo "making $(VENV) (once; PyTorch is a large download)"; $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev]'
	@touch $@

setup: $(STAMP) ## make the virtual environment (the other targets do it too)

demo: $(STAMP) ## train a small net with several methods on noisy digits and show what happened
	$(BIN)/flatmin compare $(ARGS)

test: $(STAMP) ## the ordinary tests, a few minutes; JOBS=4 for more processes, ARGS="tests/optim -x" for pytest
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(JOBS) --dist worksteal $(ARGS)

$(FRAMEWORKS_STAMP): pyproject.toml constraints.txt
	@test -x $(FRAMEWORKS_VENV)/bin/python || $(PYTHON) -m venv $(FRAMEWORKS_VENV)
	$(FRAMEWORKS_VENV)/bin/python -m pip install --quiet -c constraints.txt \
	  -e '.[digits,lightning,hf,skorch]' pytest pytest-timeout pytorch_optimizer schedulefree \
	  peft lion-pytorch bitsandbytes
	@touch $@

test-frameworks: $(FRAMEWORKS_STAMP) ## the tests with Lightning, Transformers, Accelerate and skorch; a few minutes
	$(FRAMEWORKS_VENV)/bin/python -m pytest tests/frameworks $(ARGS)

$(VISION_STAMP): pyproject.toml constraints.txt
	@test -x $(VISION_VENV)/bin/python || $(PYTHON) -m venv $(VISION_VENV)
	$(VISION_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[vision]' pytest pytest-timeout
	@touch $@

test-vision: $(VISION_STAMP) ## the tests with timm and torchvision
	$(VISION_VENV)/bin/python -m pytest tests/vision $(ARGS)

$(TRACKERS_STAMP): pyproject.toml constraints.txt
	@test -x $(TRACKERS_VENV)/bin/python || $(PYTHON) -m venv $(TRACKERS_VENV)
	@grep -vi '^pillow=' constraints.txt > $(TRACKERS_VENV)/constraints.txt
	$(TRACKERS_VENV)/bin/python -m pip install --quiet -c $(TRACKERS_VENV)/constraints.txt \
	  -e '.[tensorboard,wandb,mlflow,trackio]' pytest pytest-timeout
	@touch $@

test-trackers: $(TRACKERS_STAMP) ## the tests with TensorBoard, wandb, MLflow and Trackio
	$(TRACKERS_VENV)/bin/python -m pytest tests/trackers $(ARGS)

$(EXECUTORS_STAMP): pyproject.toml constraints.txt
	@test -x $(EXECUTORS_VENV)/bin/python || $(PYTHON) -m venv $(EXECUTORS_VENV)
	$(EXECUTORS_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[ray,slurm]' pytest pytest-timeout
	@touch $@

test-executors: $(EXECUTORS_STAMP) ## the tests with Ray and submitit, which CI leaves out; ARGS="-m slow": 200 runs each
	$(EXECUTORS_VENV)/bin/python -m pytest tests/executors -m "not slow" $(ARGS)

# The tools that build a release and check it.
$(RELEASE_STAMP): constraints.txt
	@test -x $(RELEASE_VENV)/bin/python || $(PYTHON) -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python -m pip install --quiet -c constraints.txt build twine
	@touch $@

release-check: $(RELEASE_STAMP) ## build sdist and wheel, check them, and try the wheel in a new environment; some minutes
	$(RELEASE_VENV)/bin/python tools/release_check.py $(ARGS)

OTHERS := $(FRAMEWORKS_STAMP) $(VISION_STAMP) $(TRACKERS_STAMP) $(EXECUTORS_STAMP)

test-all: $(STAMP) $(OTHERS) ## every test in every environment, half an hour or more; dated in benchmarks/results/
	$(BIN)/python tools/test_all.py frameworks=$(FRAMEWORKS_VENV)/bin/python vision=$(VISION_VENV)/bin/python \
	  trackers=$(TRACKERS_VENV)/bin/python executors=$(EXECUTORS_VENV)/bin/python

mutants: $(STAMP) ## plant faults in a copy of the package: each must fail the tests that are named for it; ten minutes
	$(BIN)/python tools/mutants.py $(ARGS)

lint: $(STAMP) ## ruff (lint and format) and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

generate: $(STAMP) ## write the tables and the picture in README and docs that follow from the code
	$(BIN)/python tools/generate.py $(ARGS)

# The site's tools go into the same environment: the tutorials run flatmin, and API pages read its docstrings.
DOCS_STAMP := $(VENV)/.flatmin-docs-installed
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS_STAMP) ## build the documentation site in build/site, run its tutorials, and open it in a browser; ARGS=--quick
	$(BIN)/python tools/site.py $(ARGS)
	$(BIN)/python -m pytest -q tests/site

types: $(STAMP) ## mypy --strict on src
	$(BIN)/mypy

bench: $(STAMP) ## the cost benchmarks; `make bench ARGS="counts --gate"` runs one of them
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove caches (runs and the virtual environment stay)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
