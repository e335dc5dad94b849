# Every target sets itself up: a virtual environment in .venv, pinned packages, the C++ extension. Needs Python >= 3.10, a C++
# compiler and a package index. Settings, each from the command line or the environment:
#   PYTHON=python3.12      the interpreter of the environment
#   PIP_FLAGS=...          for every pip install (a mirror; an index with CPU-only wheels of torch, which are much smaller)
#   FEWBITS_CACHE=DIR      where fetched models and texts are kept
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format clean

TORCH ?= torch==2.13.0
PIP_FLAGS ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$p" && break; done)

PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_FLAGS)
# A worker for every processor, as tests are small; neighbours stay together, as they share models made once.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal
NATIVE := pyproject.toml CMakeLists.txt constraints.txt $(shell find src/fewbits/kernels/cpp -type f 2>/dev/null)

help:
	@echo "make demo    fetch a small model, quantize it to 4 bits, compare it with the original, let it speak"
	@echo "make test    all tests"
	@echo "make check   format, lint, types, layers, fast tests"
	@echo "make format  format and fix the sources"
	@echo "make clean   remove the environment and everything built"

setup: .venv/.fewbits

demo: .venv/.fewbits
	@PY="$(PY)" bash scripts/demo.sh

test: .venv/.fewbits
	$(PYTEST)

check: .venv/.dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest tests/test_layers.py
	$(PYTEST) -m "not slow"

format: .venv/.dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf .venv build
	rm -f src/fewbits/kernels/_C*.so src/fewbits/kernels/_C*.pyd

.venv/.python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.10 found; install one or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up .venv with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv .venv || { echo "error: $(PYTHON) cannot make virtual environments; install its venv package" >&2; exit 1; }
	@touch $@

# torch first and alone: nothing may choose another build of it.
.venv/.torch: .venv/.python constraints.txt
	@echo "installing $(TORCH)"
	@$(PIP) "$(TORCH)"
	@touch $@

# The sources are used in place; after a change of C++ only the extension is compiled again.
.venv/.fewbits: .venv/.torch $(NATIVE)
	@echo "installing dependencies and compiling the extension"
	@$(PIP) "scikit-build-core>=0.10" "nanobind>=2.2" cmake ninja
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(PIP) --no-build-isolation -e ".[test]"
	@touch $@

.venv/.dev: .venv/.fewbits
	@$(PIP) ruff mypy types-PyYAML
	@touch $@
