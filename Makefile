# `make` lists what there is. Everything is installed into .venv; a second call is instant.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The first step on its own: where pip is told of a CPU build of torch it takes that one, and the
# rest of the dependencies then find torch there.
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help serve test lint types format kernels bench-peers clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: .venv/runtime.stamp ## serve the demo model; ARGS="MODEL --port 9000 ..." as in `fabric serve`
	@exec $(BIN)/fabric serve $(ARGS)

test: .venv/dev.stamp ## all tests; FOLDERS="law core" picks some, ARGS="-k name" goes to pytest
	@$(BIN)/python tests/suite.py $(FOLDERS) -- $(ARGS)

lint: .venv/dev.stamp ## ruff: rules and format
	$(BIN)/ruff check fabric tests
	$(BIN)/ruff format --check fabric tests

types: .venv/dev.stamp ## mypy, strict in fabric/core
	$(BIN)/mypy

format: .venv/dev.stamp ## let ruff format the code
	$(BIN)/ruff check --fix fabric tests
	$(BIN)/ruff format fabric tests

kernels: .venv/runtime.stamp ## compile every Triton kernel for GPUs that are not here; table of what they take
	@$(BIN)/python -W ignore -m fabric.kernels.gate $(ARGS)

bench-peers: .venv/runtime.stamp ## fabric and other engines on the same workloads, in alternation
	@exec $(BIN)/fabric bench peers $(ARGS)

clean: ## remove caches and build results (not .venv)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find fabric tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fabric needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "no virtual environment could be made (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }

.venv/torch.stamp: | .venv/bin/python
	@echo "installing dependencies into .venv: minutes the first time"
	@$(PIP) install --quiet "$(TORCH)"
	@touch $@

.venv/runtime.stamp: pyproject.toml .venv/torch.stamp
	@$(PIP) install --quiet --editable .
	@touch $@

.venv/dev.stamp: pyproject.toml .venv/torch.stamp
	@$(PIP) install --quiet --editable ".[dev]"
	@touch $@ .venv/runtime.stamp
