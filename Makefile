# Everything runs in .venv, made on first use. A second call installs nothing unless pyproject.toml or constraints.txt changed.
#
#   make setup     make .venv and install qkv with what tests, checks and the embedded model need
#   make bench     the main job on the embedded model: table and report (fetches the model on first use)
#   make test      the test suite, without slow and GPU tests
#   make nightly   the whole suite, slow tests included
#   make fmt       format and sort imports, in place
#   make check     lint, format and types
#   make docs      write the method pages and build the site into site/
#   make clean     remove what the targets above made, .venv included (the model cache stays: ~/.cache/qkv)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := setup
.PHONY: setup bench test nightly fmt check docs clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
ARGS ?=

setup: $(VENV)/.setup

# torch first and by itself, so that the pin (and with it a small build, where one is at hand) decides what is fetched.
$(VENV)/.setup: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[test,dev,embedded,train]'
	touch $@

$(VENV)/.docs: $(VENV)/.setup
	$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@

bench: setup
	$(BIN)/qkv bench smollm2 $(ARGS)

# Tests load models from folders only; offline mode keeps a missing network from costing minutes of retries. Their tensors are
# tiny, so a process per core with one thread each is the fastest.
WORKERS ?= 2
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: setup
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

nightly: setup
	$(PYTEST) -m "not gpu" $(ARGS)

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site dist build .pytest_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
