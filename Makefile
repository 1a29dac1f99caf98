# The targets of the README. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
STAMP := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

# Unit tests share nothing, use one core each and wait now and then; the others bring their own processes, and wait for them half of the time.
unit_OPTIONS := -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --maxprocesses 8
ALONE := tests/chaos tests/e2e tests/distributed
# Files with few long tests come first, or one worker would end long after the other.
ALONE_OPTIONS := -n 2 --dist loadfile --no-loadscope-reorder
SAMPLE := -m "not full and not gpu"

.DEFAULT_GOAL := help
.PHONY: help setup demo check format test test-full unit distributed e2e chaos bench bench-table

help:  ## List the targets
	@grep -hE '^[a-z0-9 -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 32

setup: $(STAMP)  ## Make .venv and install everything (one to three minutes, 2 GB)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + "\nSet PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about 2 GB; one to three minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## Pretrain and fine-tune a small encoder on this machine (budget: ten minutes)
	@$(BIN)/maskwright run cluster_configs/runs/demo.yaml

format: setup  ## Format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

check: setup  ## Format, lint, types, layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo > .lint-imports.log 2>&1 || { cat .lint-imports.log; rm -f .lint-imports.log; exit 1; }
	@rm -f .lint-imports.log

unit distributed e2e: setup  ## One part of the tests
	@$(PYTEST) tests/$@ $(SAMPLE) $($@_OPTIONS) -q

chaos: setup  ## Faults into real runs on a real cluster (5 minutes), or FAULTS=50 of them
	@MASKWRIGHT_FAULTS=$(or $(FAULTS),4) $(PYTEST) tests/chaos/test_schedule.py -s

test: check  ## Everything that must hold before a change lands (budget: 15 minutes on 2 cores)
	@$(PYTEST) tests/unit $(SAMPLE) $(unit_OPTIONS) --durations=5
	@$(PYTEST) $(ALONE) $(ALONE_OPTIONS) $(SAMPLE) --durations=15

test-full: check  ## The same with every sweep
	@$(PYTEST) tests/unit $(unit_OPTIONS) --durations=10
	@$(PYTEST) $(ALONE) $(ALONE_OPTIONS) --durations=30

bench: setup  ## Measure every claim, or BENCH=name; SHORT=1 to try, CORPUS=path, RESULTS=1 to keep the results
	@$(BIN)/python -m benchmarks $(BENCH) $(if $(SHORT),--short) $(if $(CORPUS),--corpus $(CORPUS)) $(if $(RUNS),--runs $(RUNS)) $(if $(RESULTS),--results)

bench-table: setup  ## Make the README's table from the committed results
	@$(BIN)/python -m benchmarks.table
