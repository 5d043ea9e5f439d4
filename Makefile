# `make test` and `make demo` do all the set-up. Variables:
#   PYTHON    the interpreter that makes the environment (3.11 or newer)
#   PIP_ARGS  more arguments for pip, e.g. PIP_ARGS="--extra-index-url INDEX" for CPU builds of torch
#   MODEL, CASE, BENCH_ARGS  for `make bench`
PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv
CASE ?= prefill,decode:1,decode:8
BENCH_ARGS ?=

BIN := $(VENV)/bin
# Every file that the installed package is made from; a change to one of them installs again.
BUILD_INPUTS := pyproject.toml constraints.txt $(wildcard setup.py kernels/csrc/*)
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
# What `make demo` needs: the base package, or whatever fuller environment is there already.
ANY := $(if $(wildcard $(DEV)),$(DEV),$(BASE))
# Tests that need one core and nothing that others use. They run beside the others, and their words come last.
BESIDE := tests/pure tests/cpu/test_gpu_model.py $(sort $(wildcard tests/cpu/test_triton_*.py))

.PHONY: help setup test lint pytest demo bench clean
.DELETE_ON_ERROR:

help:
	@echo "make setup   environment with development tools in $(VENV)"
	@echo "make test    ruff, mypy, pytest"
	@echo "make lint    ruff and mypy only"
	@echo "make demo    a batch on a small random model"
	@echo "make bench   MODEL=DIR [CASE=$(CASE)]"
	@echo "make clean   removes $(VENV) and what was built"

setup: $(DEV)

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "make: PYTHON=$(PYTHON) is not there; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: PYTHON=$(PYTHON) is $$("$(PYTHON)" -V 2>&1), Quire needs 3.11 or newer; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' || { echo "make: PYTHON=$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(BASE): $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(DEV): $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(DEV)
	@$(BIN)/python -m pytest $(BESIDE) >$(VENV)/beside.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(BESIDE)); others=$$?; \
	wait $$beside; beside=$$?; cat $(VENV)/beside.log; exit $$((others | beside))

test: lint
	@$(MAKE) --no-print-directory pytest

demo: $(ANY)
	$(BIN)/python -m launch.demo

bench: $(ANY)
	@test -n "$(MODEL)" || { echo "make: MODEL is missing; make bench MODEL=/path/to/model" >&2; exit 1; }
	$(BIN)/quire bench --model "$(MODEL)" --case "$(CASE)" $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
