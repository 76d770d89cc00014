# make quickstart   fine-tune pretrained SUGAR weights on scikit-learn's digits on the CPU and show what came out
# make test         run the tests on two cores
# make clean        remove the environment and what the tools left
#
# Both make the environment .venv first if it is missing. PYTHON=python3.12 chooses the interpreter for it.

PYTHON ?= python3
TESTS ?= tests
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help quickstart test clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps keep a second run from installing again; a new pyproject.toml asks for it.
$(VENV)/installed-train: pyproject.toml | $(BIN)/python
	$(PIP) -e ".[train]"
	touch $@

$(VENV)/installed-test: pyproject.toml | $(BIN)/python
	$(PIP) -e ".[test]"
	touch $@ $(VENV)/installed-train

quickstart: $(VENV)/installed-train
	$(BIN)/python scripts/quickstart.py

test: $(VENV)/installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
