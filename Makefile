# Nothing to remember beyond: make demo, make test, make lint, make bench.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# --no-compile: pip byte-compiles everything on one core, which takes longer than the rest of the installation. What
# Ray's many processes would else all compile at once at the first start is compiled here, on all cores.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
COMPILE = cd $(VENV)/lib/python3*/site-packages && $(abspath $(BIN))/python -m compileall -q -j 0 -x /testing/ ray torch deepspeed

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
	$(COMPILE)
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0 -e '.[dev]'
	$(COMPILE)
	touch $@ $(VENV)/.installed
