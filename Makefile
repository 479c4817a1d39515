# Each target does its own set-up: a virtual environment in .venv, and the package in it, installed again only when
# pyproject.toml changes. PYTHON picks the interpreter (3.11 or 3.12).

PYTHON ?= python3
BIN := .venv/bin
# Without a notice that the new environment's pip is not the newest.
PIP_OPTIONS := --quiet --disable-pip-version-check

.PHONY: demo test test-all bench lint

demo: .venv/.installed
	$(BIN)/minimind-ray demo

test: .venv/.installed-dev
	$(BIN)/python -m pytest -m 'not long'

test-all: .venv/.installed-dev
	$(BIN)/python -m pytest

# Options and parts: make bench ARGS="--help". MINIMIND_REPO: a checkout of MiniMind; MINIMIND_CORPUS: a corpus folder.
bench: .venv/.installed-dev
	$(BIN)/python -m tests.bench $(ARGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_OPTIONS) --editable .
	touch $@

# The development tools come on top of the package, so this serves `make demo` too.
.venv/.installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_OPTIONS) --editable '.[dev]'
	touch .venv/.installed $@
