# make quickstart   fine-tune pretrained SUGAR weights on scikit-learn's digits on the CPU and show what came out
# make test         run the tests that a change needs first, on two cores
# make test-all     run all tests
# make test-torch   run the library's tests with another torch: make test-torch TORCH=2.6.0 (MARK= the slow ones, too)
# make test-hosts   install transformers, Lightning, PEFT and others beside it and train with them
# make docs         build the pages of docs/ as a site in build/docs/
# make clean        remove the environment and what the tools left
#
# They make the environment .venv first if it is missing. PYTHON=python3.12 chooses the interpreter for it.

PYTHON ?= python3
TESTS ?= tests
JOBS ?= 2
MARK ?= not slow

VENV := .venv
OTHER := .venv-torch-$(TORCH)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help quickstart test test-all test-torch test-hosts docs clean
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

$(VENV)/installed-hosts: pyproject.toml | $(BIN)/python
	$(PIP) -e ".[hosts]"
	touch $@ $(VENV)/installed-test $(VENV)/installed-train

$(VENV)/installed-docs: pyproject.toml | $(BIN)/python
	$(PIP) -e ".[docs]"
	touch $@

quickstart: $(VENV)/installed-train
	$(BIN)/python scripts/quickstart.py

test: $(VENV)/installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(TESTS)

test-all: $(VENV)/installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

# The wheel, not the checkout, in an environment of its own, from a copy of the tests beside nothing of the laboratory.
test-torch:
	@test -n "$(TORCH)" || { echo "make: error: name a version, e.g. make test-torch TORCH=2.6.0" >&2; exit 2; }
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --disable-pip-version-check "torch==$(TORCH)" . pytest pytest-xdist setuptools
	rm -rf $(OTHER)/check && mkdir -p $(OTHER)/check/tests
	cp -r tests/conftest.py tests/library $(OTHER)/check/tests/ && cp pyproject.toml $(OTHER)/check/
	cd $(OTHER)/check && $(ONE_THREAD) ../bin/python -m pytest -n $(JOBS) --dist worksteal -p no:cacheprovider -rs \
		-m "$(MARK)" tests/library

test-hosts: $(VENV)/installed-hosts
	$(ONE_THREAD) $(BIN)/python -m pytest -rs tests/lab/test_hosts.py tests/lab/test_transformers.py

# A warning is an error.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W -q -b html -d build/doctrees docs build/docs
	@echo build/docs/index.html

clean:
	rm -rf $(VENV) .venv-torch-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
