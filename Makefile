PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The oldest Triton the kernels are held to and the newest; requirements.txt pins the one torch asks for,
# which compiles them in the other tests.
OLDEST := 3.6.0
NEWEST := 3.9.0
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help train rlhf test test-ops lint bench bench-control learn gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  PYTHON=python3.12 chooses the interpreter of a new $(VENV); ARGS="..." adds flags to a target'

train: $(VENV)/ready ## train CartPole-v1 until it is solved, into a new folder under runs/
	$(BIN)/ppo-fast train CartPole-v1 --total-timesteps 150000 --stop-return 475 $(ARGS)

rlhf: $(VENV)/ready-llm ## the whole of RLHF on generated stories, into runs/rlhf/TIME, 4 minutes
	$(BIN)/ppo-fast rlhf run $(ARGS)

test: test-kernels-$(OLDEST) test-kernels-$(NEWEST) test-ops ## run all tests; -j2 -O runs two of the three parts at a time

test-ops: $(VENV)/ready-learn
	$(BIN)/python -m pytest $(ARGS)

# Triton reads TRITON_INTERPRET when a kernel is defined, so the interpreter has processes of its own.
test-kernels-%: $(VENV)/ready-learn $(VENV)/triton-%/ready
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton-$* $(BIN)/python -m pytest tests/kernels $(ARGS)

lint: $(VENV)/ready ## ruff check, ruff format --check and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready-learn ## time every op and the trainer against the peers
	@for script in benchmarks/bench_*.py; do \
	    echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; \
	done

bench-control: $(VENV)/ready-peers ## time training against every peer, 23 minutes on two quiet cores
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_control.py --case all --json $(ARGS)

learn: $(VENV)/ready-learn ## train the reference environments over seeds and write the table
	$(BIN)/python benchmarks/learn.py $(ARGS)

# No set-up: a lent GPU machine cannot download, and has torch.
gpu: ## run the GPU tests and the kernel benchmarks; without a GPU: ARGS=--tiny
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu.py $(ARGS)

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

$(VENV)/ready-llm: $(VENV)/ready requirements-llm.txt
	$(BIN)/python -m pip install -r requirements-llm.txt
	@touch $@

$(VENV)/ready-learn: $(VENV)/ready-llm requirements-learn.txt
	$(BIN)/python -m pip install -r requirements-learn.txt
	@touch $@

$(VENV)/ready-peers: $(VENV)/ready-learn requirements-peers.txt
	$(BIN)/python -m pip install -r requirements-peers.txt
	@touch $@

.PRECIOUS: $(VENV)/triton-%/ready
$(VENV)/triton-%/ready: $(VENV)/ready
	$(BIN)/python -m pip install --no-deps --target $(VENV)/triton-$* triton==$*
	@touch $@
