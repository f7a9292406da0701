# The two commands of the README are `make run` and `make test`. Each sets up what it needs, from nothing.
PYTHON ?= python3
VENV ?= .venv
ENGINES ?= .venv-engines
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# One busy core is faster than two that wait for each other; the commands set their own thread counts.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-engines check format docs docs-serve bench bench-retrieval notebooks screenshots checkpoint simulator wheel clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("searchqa-gym needs Python 3.11 or newer; set PYTHON=<path>") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.agents: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing (torch and transformers included; a minute or two) ..."
	$(PIP) --editable '.[agents]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.agents
	$(PIP) --editable '.[agents,test]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.test
	$(PIP) --editable '.[dev]'
	@touch $@

run: $(VENV)/.agents ## train an agent to search, from nothing, and show that it learned (about 3 minutes on 2 cores)
	$(BIN)/searchqa train

test: $(VENV)/.test ## run the tests (real questions too where SEARCHQA_DATA names them)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.test ## run the long tests
	$(BIN)/python -m pytest -m slow $(ARGS)

$(ENGINES)/.made: scripts/engines_environment.sh pyproject.toml | $(VENV)/.test
	scripts/engines_environment.sh $(ENGINES) $(VENV)

test-engines: $(ENGINES)/.made ## test the adapters for verl and OpenRLHF, in an environment of their own (about two minutes)
	$(ENGINES)/bin/python -m pytest -m "slow or not slow" \
	  $(addprefix tests/agents/integrations/test_,verl.py verl_recipe.py verl_scripts.py openrlhf.py absent_engines.py rows.py) $(ARGS)

check: $(VENV)/.dev ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[docs]'
	@touch $@

# Not with --quiet: mkdocs then counts no warnings, and --strict finds none.
docs: $(VENV)/.docs ## build the documentation site into site/; a broken link, or anything that would be loaded from another host, is an error
	$(BIN)/python scripts/docs_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.docs ## serve the documentation site, made again as pages change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/.test
	$(PIP) --editable '.[bench]'
	@touch $@

bench: $(VENV)/.bench ## measure: environment step, import time, rollout, training step, retrieval (more of it where SEARCHQA_DATA is set)
	$(BIN)/python tests/benchmarks/bench_environment.py
	$(BIN)/python tests/benchmarks/bench_import.py
	$(BIN)/python tests/benchmarks/bench_rollout.py
	$(BIN)/python tests/benchmarks/bench_training_step.py
	$(BIN)/python tests/benchmarks/bench_search_step.py --passages 100000
	$(BIN)/python tests/benchmarks/bench_retrieval_sizes.py --passages 10000 100000
	@if [ -n "$$SEARCHQA_DATA" ]; then for script in retrieval search_step; do $(BIN)/python tests/benchmarks/bench_$$script.py \
	  --corpus "$$SEARCHQA_DATA/hotpotqa/corpus.jsonl.gz" --questions "$$SEARCHQA_DATA/hotpotqa/questions.jsonl.gz" || exit 1; done; \
	  else echo "bench_retrieval, bench_search_step on real passages: set SEARCHQA_DATA to run them"; fi

bench-retrieval: $(VENV)/.bench ## measure retrieval at a million passages and recall on real questions (an hour or two; 15 GB of disk in runs/)
	$(BIN)/python tests/benchmarks/bench_retrieval_sizes.py
	$(BIN)/python tests/benchmarks/bench_disk.py --passages 100000 300000 1000000 --estimate 21000000
	@if [ -n "$$SEARCHQA_DATA" ]; then $(BIN)/python tests/benchmarks/bench_recall.py; else echo "bench_recall: set SEARCHQA_DATA to run it"; fi

notebooks: $(VENV)/.test ## run the notebooks and keep their outputs in them (about five minutes)
	$(BIN)/python scripts/run_notebooks.py

screenshots: $(VENV)/.test ## make the pictures of pages in docs/ again, in a headless browser (about four minutes)
	$(BIN)/python scripts/screenshots.py

checkpoint: $(VENV)/.agents ## make the shipped SFT checkpoints again, byte for byte with these versions (about 6 minutes)
	rm -rf runs/world-sft runs/world-shy runs/world-deep $(addprefix agents/searchqa_agents/checkpoints/world-,sft shy deep)
	$(BIN)/searchqa sft run_dir=runs/world-sft seed=0 threads=1
	$(BIN)/searchqa sft run_dir=runs/world-shy seed=0 threads=1 sft.steps=600 demonstrations=shyest_oracle env.dialect=r1-searcher 'env.prompt="{question}\n<think>"'
	$(BIN)/searchqa sft run_dir=runs/world-deep seed=0 threads=1 sft.steps=600 env.preset=deep
	mkdir -p agents/searchqa_agents/checkpoints
	for name in sft shy deep; do cp -r runs/world-$$name/model agents/searchqa_agents/checkpoints/world-$$name; done

simulator: $(VENV)/.agents ## make the shipped simulated search engine of the world again (about 3 minutes)
	rm -rf runs/simulator agents/searchqa_agents/checkpoints/world-simulator
	$(BIN)/searchqa simulator collect env.top_k=3 threads=1 run_dir=runs/simulator/collected
	$(BIN)/searchqa simulator label rows=runs/simulator/collected by=titles run_dir=runs/simulator/labelled
	$(BIN)/searchqa simulator train rows=runs/simulator/labelled threads=1 run_dir=runs/simulator/trained
	cp -r runs/simulator/trained/model agents/searchqa_agents/checkpoints/world-simulator

wheel: $(VENV)/.dev ## build the wheel and the sdist
	$(PIP) build && $(BIN)/python -m build

clean: ## remove the environment and caches
	rm -rf $(VENV) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
