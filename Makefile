# `make demo` trains a Switch Transformer and its dense twin; `make test` runs the tests; `make paper`
# measures the tables of the paper.

PYTHON ?= python3
BUDGET ?= 6m
BIN := .venv/bin

# Without an NVIDIA GPU, take the small CPU build of PyTorch instead of gigabytes of CUDA.
CONSTRAINT := $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: install demo paper test test-slow check format clean

install: .venv/installed

.venv/installed: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 13) and \
	  f"switchlm needs Python 3.11 to 3.13, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(PIP) install -q $(CONSTRAINT) torch numpy
	$(PIP) install -q $(CONSTRAINT) -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) install -q $(CONSTRAINT) -e '.[test]'
	@touch $@

.venv/installed-lint: .venv/installed-test
	$(PIP) install -q $(CONSTRAINT) -e '.[lint]'
	@touch $@

demo: .venv/installed
	$(BIN)/switchlm compare --out runs/demo --overwrite --budget $(BUDGET)

.venv/installed-paper: .venv/installed
	$(PIP) install -q $(CONSTRAINT) -e '.[paper]'
	@touch $@

# The paper's tables and figures, 3 to 3.5 hours on 2 cores; goes on where it was stopped.
paper: .venv/installed-paper
	$(BIN)/python -m benchmarks.paper

# A test that hangs is ended, and says where it hung.
HANGS := -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 $(HANGS) -m 'not slow and not gpu'

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -n 2 -m 'not gpu' --hypothesis-profile thorough

check: .venv/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: .venv/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build dist
