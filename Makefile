# One-command set-up, demo and tests. `make help` lists what there is.
# A second call is quick: the stamps are renewed only when a requirements file changes.

PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python

# Extra words for pip (for example an index with CPU-only builds of torch), pytest and the demo.
PIP_ARGS    ?=
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal
DEMO_ARGS   ?=
GPU_ARGS    ?=

STAMP     = $(VENV)/.requirements
STAMP_DEV = $(VENV)/.requirements-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev demo gpu test lint format

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) PIP_ARGS= PYTEST_ARGS='$(PYTEST_ARGS)' DEMO_ARGS= GPU_ARGS="

setup: $(STAMP)  ## create .venv and install requirements.txt (several GB: torch)

# Memory that a step frees stays for the next one, in place of fresh pages from the system each time (glibc).
demo: export MALLOC_MMAP_MAX_ = 0
demo: export MALLOC_TRIM_THRESHOLD_ = -1
demo: $(STAMP)  ## set-up, then pretrain, classify and segment on the embedded demo set; see runs/demo/report.html (stopped: call it again)
	$(PY) -m downstream.demo $(DEMO_ARGS)

gpu: $(STAMP)  ## set-up, then check everything on this machine's GPU; see runs/gpu/report.html (GPU_ARGS=--dry needs none)
	$(PY) -m benchmarks.gpu_check $(GPU_ARGS)

test: lint  ## set-up, lint, then the whole test suite on all cores
	$(PY) -m pytest $(PYTEST_ARGS)

setup-dev: $(STAMP_DEV)  ## create .venv with what tests and lint need on top

lint: $(STAMP_DEV)  ## ruff (rules and format) and mypy (strict, on models/)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP_DEV)  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	@touch $@

$(STAMP_DEV): requirements-dev.txt $(STAMP)
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -r requirements-dev.txt
	@touch $@
