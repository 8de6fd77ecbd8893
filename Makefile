# Each target makes .venv itself when it is missing or older than pyproject.toml / constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test lint format slow gpu bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

setup: $(STAMP)  ## make .venv with everything that development and the demo need

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python is missing: install Python 3.11 or newer, or type make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c '' 2>/dev/null || { echo "$(PYTHON) is there and cannot be started: mend it, or type make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: vlm-dist needs 3.11 or newer; type make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "A C++ compiler is missing: install one (Debian: apt-get install g++)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing vlm-dist and its dependencies into $(VENV) (about two minutes, 2.7 GB with a CPU build of torch)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## the whole way on a small corpus that it renders itself: videos to a table of results
	@$(BIN)/vlm-dist demo

test: $(STAMP)  ## every test but the slow and the GPU ones (under 12 minutes on 2 cores)
	@$(BIN)/python -m pytest

slow: $(STAMP)  ## fault injection and long runs (under 45 minutes on 2 cores)
	@$(BIN)/python -m pytest -m slow

gpu: $(STAMP)  ## tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

lint: $(STAMP)  ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(STAMP)  ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## the scripts in benchmarks/ that need nothing but this machine
	@for name in cli_start extract extract_scale store; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:  ## remove .venv and what the tools left behind
	@rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis demo-workspace
