# Each target does its own set-up: a virtual environment in .venv, and the package in it, installed again only when
# pyproject.toml changes. PYTHON picks the interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint

demo: .venv/.installed
	$(BIN)/minimind-ray demo

test: .venv/.installed-dev
	$(BIN)/python -m pytest

# CORPUS: a folder with pretrain/, sft/, lora/ and dpo/; TOKENIZER: a directory; MINIMIND: a checkout of MiniMind;
# with BASE, an SFT run or model, sweeps too.
bench: .venv/.installed-dev
	@test "$(CORPUS)" -a "$(TOKENIZER)" -a "$(MINIMIND)" || \
		{ echo "usage: make bench CORPUS=FOLDER TOKENIZER=DIRECTORY MINIMIND=CHECKOUT"; exit 2; }
	$(BIN)/python tests/bench/bench_training.py --corpus $(CORPUS) --tokenizer $(TOKENIZER) --minimind $(MINIMIND)
	$(BIN)/python tests/bench/bench_ray_overhead.py --corpus $(CORPUS) --tokenizer $(TOKENIZER)
	$(BIN)/python tests/bench/bench_prepare.py $(CORPUS)/pretrain --tokenizer $(TOKENIZER)
	@test -z "$(BASE)" || $(BIN)/python tests/bench/bench_sweep.py --corpus $(CORPUS) --base $(BASE)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# The development tools come on top of the package, so this serves `make demo` too.
.venv/.installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch .venv/.installed $@
