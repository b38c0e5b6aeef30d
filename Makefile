# make train: set up and train on real handwritten digits.  make test: the tests, in minutes.  make check: lint and types.
# make test-all: those that take longer, too.  make slurm-test: all of SLURM, as root.  make soak: kills, bit flips, stalls.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev

.PHONY: help train test test-all slurm-test soak check format clean

help:
	@sed -n 1,2p Makefile

# uv inside the environment installs everything in a fraction of pip's time.
$(VENV)/bin/uv:
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(READY): requirements.txt pyproject.toml | $(VENV)/bin/uv
	@echo "Installing requirements.txt (torch and its companions: a few GB the first time)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	@touch $@

$(DEV_READY): requirements-dev.txt $(READY)
	@echo "Installing requirements-dev.txt"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-dev.txt
	@touch $@

# The launcher by its module: the `accelerate` command imports every sub-command first, which takes 5 s longer.
LAUNCH := $(BIN)/python -m accelerate.commands.launch

train: $(READY)
	@echo "Training on handwritten digits: accelerate launch train.py"
	@$(LAUNCH) --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train.py

PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: $(DEV_READY)
	$(PYTEST) -m "not slow and not cluster"

test-all: test
	$(PYTEST) -m "slow and not cluster"

soak: $(DEV_READY)
	$(BIN)/python tests/soak.py --kills 100
	$(BIN)/python tests/bit_flips.py --flips 100
	$(BIN)/python tests/stalls.py --stalls 20

# As root, with munge, slurmctld, slurmd and slurm-client: about a quarter of an hour on two cores.
slurm-test: $(DEV_READY)
	$(BIN)/python -m pytest tests/test_slurm.py tests/test_sweep.py tests/test_sync_wandb.py

check: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
