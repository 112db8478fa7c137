# Every target sets up .venv first when it is missing or older than pyproject.toml or constraints.txt.
.DEFAULT_GOAL := help
.PHONY: help demo test verify lint format docs examples bench clean
SHELL := /bin/bash

# where torch comes from on a machine without an NVIDIA card
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export TORCH_INDEX
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# no usage reports from the libraries that we stand on
export HF_HUB_DISABLE_TELEMETRY := 1

# the first Python that is new enough and can make an environment; PYTHON=... to choose another
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$python" && break; done)

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

demo: $(VENV)/.standard  ## distil the packaged digits teacher into a one-step student: a table and a report (minutes)
	$(BIN)/fewstep distill digits $(ARGS)

test: lint docs  ## lint, types, docs examples, tests with coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## links, examples and commands in README.md and docs/ hold
	OMP_NUM_THREADS=1 $(BIN)/python scripts/check_docs.py

examples: $(VENV)/.dev  ## run every file in examples/
	OMP_NUM_THREADS=1 $(BIN)/python scripts/check_docs.py --examples

verify: $(VENV)/.standard  ## run every shipped recipe over its seeds and hold it to its [expect] (hours; goes on where it stopped)
	$(BIN)/fewstep verify all $(ARGS)

bench: $(VENV)/.dev  ## time what must be fast
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

clean:  ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis htmlcov .coverage dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define set_up
	@test -n "$(PYTHON)" || { echo "fewstep needs Python 3.11 or newer with the venv module, and found none; install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" scripts/setup.py $(VENV) $(1)
	@touch $@
endef

$(VENV)/.standard: pyproject.toml constraints.txt scripts/setup.py
	$(call set_up,standard)

$(VENV)/.dev: $(VENV)/.standard
	$(call set_up,standard dev)
