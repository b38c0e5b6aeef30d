# make train: set up and train on real handwritten digits.  make test: the tests, in minutes.  make check: lint and types.
# make test-all: those that take longer, too.  make slurm-test: all of SLURM, as root.  make soak: kills, bit flips, stalls.
# make bench: how fast, beside others' loops; ten minutes.
# make wheels: what a machine without network lacks beside its own torch (docs/offline.md).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev

# Containers often set it; then every program compiles torch and all else anew, which took 5 s of each start (2-core EPYC).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help train wheels test test-all slurm-test soak bench check format clean

help:
	@sed -n 1,4p Makefile

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

# The machine the wheels are for: its Python (by default this one's version) and processor (x86_64 or aarch64).
WHEELS_PYTHON ?= $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
WHEELS_MACHINE ?= x86_64
# pip wants every kind of wheel named that the machine takes: those for glibc 2.28 and older.
WHEELS_PLATFORMS = $(foreach minor,$(shell seq 28 -1 5),--platform manylinux_2_$(minor)_$(WHEELS_MACHINE)) \
	--platform manylinux2014_$(WHEELS_MACHINE)
COMPILE = sed '/^torch/s/>=/==/; /^-e/d' requirements.txt | grep $(1) | $(BIN)/uv pip compile --quiet --no-header \
	--no-annotate --only-binary :all: --python-version $(WHEELS_PYTHON) \
	--python-platform $(WHEELS_MACHINE)-manylinux_2_28 --output-file $(2) - >/dev/null

# All that requirements.txt comes to with the oldest torch, less what that torch and its torchvision come to alone.
# setuptools comes along: pip installs the project with it, and a Python may have one that is too old.
wheels: $(VENV)/bin/uv
	@echo "Filling wheels/ for Python $(WHEELS_PYTHON) on Linux, $(WHEELS_MACHINE)"
	@rm -rf wheels && mkdir wheels
	@$(call COMPILE,'.',wheels/all.txt)
	@$(call COMPILE,'^torch',wheels/torch.txt)
	@{ grep -vxFf wheels/torch.txt wheels/all.txt; grep '^setuptools=' wheels/all.txt; } | sort -u >wheels/list.txt
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest wheels \
		--python-version $(WHEELS_PYTHON) $(WHEELS_PLATFORMS) --requirement wheels/list.txt
	@rm wheels/*.txt
	@du -sh wheels

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
	$(BIN)/python -m pytest tests/test_slurm.py tests/test_sync_wandb.py

bench: $(READY)
	$(BIN)/python benchmarks/speed.py

check: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) wheels *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
