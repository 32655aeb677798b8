# Nothing to remember beyond: make demo, make test, make lint, make bench.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# --no-compile: byte-compiling everything that torch and ray ship takes longer than the rest of the installation;
# Python compiles what it imports.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench format clean

demo: $(VENV)/.installed models/chain-teacher  ## Train a teacher, turn it into a diffusion model, report.
	rm -rf runs/demo
	$(BIN)/opdlm train deploy/demo.yaml

models/chain-teacher: | $(VENV)/.installed  # trained on first use, then kept
	$(BIN)/opdlm pretrain $@ --task chain

test: $(VENV)/.installed-dev  ## All tests.
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev  ## Format, lint, types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## Measurements; see tests/benchmarks/RESULTS.md.
	$(BIN)/python -m tests.benchmarks.decoder

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Everything that make made, runs and models too.
	rm -rf $(VENV) runs models

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is pinned on the command line as well: an open requirement would pull the newest CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0 -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0 -e '.[dev]'
	touch $@ $(VENV)/.installed
