PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help train test lint bench learn gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  PYTHON=python3.12 chooses the interpreter of a new $(VENV); ARGS="..." adds flags to a target'

train: $(VENV)/ready ## train CartPole-v1 until it is solved, into a new folder under runs/
	$(BIN)/ppo-fast train CartPole-v1 --total-timesteps 100000 --stop-return 475 $(ARGS)

test: $(VENV)/ready-learn ## run the tests, those against the peers and their environments too
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/ready ## ruff check, ruff format --check and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready-learn ## time every op and the trainer against the peers
	@for script in benchmarks/bench_*.py; do \
	    echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; \
	done

learn: $(VENV)/ready-learn ## train the reference environments over seeds and write the table
	$(BIN)/python benchmarks/learn.py $(ARGS)

gpu: ## run the GPU suite (not yet: it arrives with the kernels)
	@echo 'Not yet: the GPU suite arrives with the kernels. Nothing was run.'

clean: ## remove .venv, caches and build output; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find ppo_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last: an interrupted set-up is taken up again by the next call.
$(VENV)/ready: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ppo-fast needs Python 3.11 or newer, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/ready-learn: $(VENV)/ready requirements-learn.txt
	$(BIN)/python -m pip install -r requirements-learn.txt
	@touch $@
