# Needs Python 3.11 or later, make and a package index; everything else goes into $(VENV).
#
#   make demo     install what the demo needs and train on handwritten digits over four sites
#   make test     install everything and run every test
#   make lint types format clean
#
# PYTHON=python3.12 chooses the interpreter. PIP_FLAGS goes to pip: a Linux machine without a GPU saves gigabytes with
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2

BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)
PROJECT := pyproject.toml constraints.txt

.PHONY: demo test lint types format clean

demo: $(VENV)/.demo
	$(BIN)/python -m workflows.fedavg

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; flarebus needs 3.11 or later: make PYTHON=..." % v)'
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run instant; they are older than the project's files only when those change.
$(VENV)/.demo: $(PROJECT) | $(VENV)/bin/python
	$(INSTALL) --editable ".[sklearn,plot]"
	@touch $@

$(VENV)/.dev: $(PROJECT) | $(VENV)/bin/python
	$(INSTALL) --editable ".[all,dev]"
	@touch $@ $(VENV)/.demo
