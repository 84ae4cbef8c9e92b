# sutrain: `make demo` shows the whole road, `make test` proves it. `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
# Another torch build: make demo TORCH='torch==2.13.0 --index-url URL-OF-THE-WHEELS-FOR-YOUR-ACCELERATOR'
# It stays as long as nobody asks for a different one: without TORCH the environment is left as it is.
ifneq ($(origin TORCH),undefined)
ifneq ($(strip $(TORCH)),$(strip $(shell cat $(VENV)/.torch 2>/dev/null)))
$(VENV)/.torch: another-torch
endif
endif
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# DeepSpeed builds its communication extension with ninja from the environment into a folder of the environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

.PHONY: help demo test test-slow experiments lint format clean setup another-torch

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1 \t/' | expand -t 20

setup: $(VENV)/.built  ## create .venv, install pinned dependencies, build the communication extension

demo: setup  ## raw text to a pretrained model on this machine, in about ten minutes
	@$(BIN)/python -m cluster.demo

test: $(VENV)/.tests setup  ## the test suite, ten to twenty minutes on two cores
	@# A thread for each of the two: threads that wait for one another in loops take the cores from who works.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(VENV)/.tests setup  ## the long tests (fault injection, scale); evidence in build/evidence/*.json
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

experiments: setup  ## what the models' authors claim, run here; writes docs/experiments.md (about an hour)
	@$(BIN)/python -m experiments

lint: $(VENV)/.tests  ## ruff and the type checker
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.tests  ## let ruff rewrite the sources
	@$(BIN)/ruff check --fix-only . ; $(BIN)/ruff format .

clean:  ## remove the environment, build and caches (data and runs stay)
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each step leaves a stamp that is made only when it went well, so an interrupted set-up goes on where it stopped.
$(VENV)/.created:
	@PYTHON="$(PYTHON)" bash scripts/check_prerequisites.sh
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "installing $(TORCH)"
	@# What is there goes first, or pip would take it for the other build of its version; what was compiled for it too.
	@if [ -e $@ ]; then rm -rf $@ $(TORCH_EXTENSIONS_DIR); $(BIN)/python -m pip uninstall -q -y torch; fi
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q $(TORCH)
	@echo '$(TORCH)' > $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "installing sutrain and its dependencies (about a minute and a half)"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[s3]'
	@touch $@

$(VENV)/.built: $(VENV)/.installed
	@echo "building DeepSpeed's communication extension (about a minute, once)"
	@$(BIN)/python -m sutrain.build_extension
	@touch $@

$(VENV)/.tests: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[s3,dev]'
	@# Without what it asks for (fairscale, timm, an old torchvision): the comparison of DeepNorm uses none of it.
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps torchscale
	@touch $@
