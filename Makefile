# Two commands are enough: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench bench-gpu docs clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' Makefile

demo: .venv/studies  ## train on Fashion-MNIST with AdamW, SGD and IVON, compare, write the report
	@$(BIN)/posterity compare fashion-mnist --out runs/fashion-mnist

test: .venv/dev lint  ## lint, types, tests and doctests, but for those of `make test-all`
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: .venv/frameworks  ## the tests that take several processes or a whole framework
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

lint: .venv/dev  ## format, lint, types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/dev  ## what IVON costs beside AdamW on this machine: steps, memory, whole training
	@$(BIN)/python -m benchmarks

bench-gpu: .venv/dev  ## the same on a GPU (PyTorch with CUDA has to be in .venv)
	@$(BIN)/python -m benchmarks --device cuda --only optimizers memory training sizes --out runs/bench-gpu

docs: .venv/dev  ## the documentation as a site, to site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
	@echo "site/index.html; to search in it: $(BIN)/mkdocs serve"

clean:  ## remove the environment and what tools cache (runs/ stays)
	rm -rf .venv site .ruff_cache .pytest_cache build src/*.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null || \
	  { echo "posterity needs Python 3.10 or newer; '$(PYTHON)' is none. Try: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "posterity needs Python's venv module. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

# Installed in the stages that are needed: .venv/studies runs, .venv/dev also tests, .venv/frameworks
# also trains in the frameworks of others.
.venv/studies .venv/dev .venv/frameworks: .venv/%: pyproject.toml constraints.txt $(wildcard src/posterity/ops/_*.cpp src/posterity/ops/_*.h) | .venv/bin/python
	@echo "setting up .venv ($*): about a minute" >&2
	@$(BIN)/python -m pip install -q --progress-bar off -c constraints.txt -e '.[$*]' 2>.venv/install.log || \
	  { cat .venv/install.log >&2; echo "posterity: installing into .venv failed; the lines above say why" >&2; exit 1; }
	@touch $@
