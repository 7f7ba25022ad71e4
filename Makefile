# Every target makes its own environment in $(VENV) from a bare python3:
#   make test                         the tests
#   make demo                         a quick benchmark, then a network trained on real data
#   make test TORCH="torch==2.13.0"   with that torch (default: the newest)
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup build test demo bench-quick lint types format sanitize across-torch clean FORCE

help:
	@sed -n '2,4s/^# *//p' Makefile
	@echo "also: build lint types format sanitize across-torch clean"

# Holds the choice of torch: a different one makes the set-up run again.
$(VENV)/torch-choice: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# torch comes first, so that bnext is built against it and not against a second copy.
$(VENV)/ready: pyproject.toml $(VENV)/torch-choice
	$(PYTHON) -m venv $(VENV)
	python -m pip install -q "$(TORCH)" "setuptools>=77" "pybind11>=2.13" ninja
	python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

setup: $(VENV)/ready

build: setup
	python setup.py -q build_ext --inplace

test: build
	python -m pytest $(PYTEST_ARGS)

demo: build
	python -m benchmarks --quick
	python -m benchmarks train

bench-quick: build
	python -m benchmarks --quick

PYTHON_FILES = bnext tests $(wildcard benchmarks) setup.py _backend.py
CXX_FILES = $(shell git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')

lint: setup
	ruff check $(PYTHON_FILES)
	ruff format --check $(PYTHON_FILES)
	clang-format --dry-run -Werror $(CXX_FILES)

types: setup
	mypy

format: setup
	ruff check --fix-only $(PYTHON_FILES)
	ruff format $(PYTHON_FILES)
	clang-format -i $(CXX_FILES)

# The C++ under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: setup
	tests/sanitize.sh $(PYTEST_ARGS)

# One wheel under several torches: make across-torch PYTHONS="a/bin/python b/bin/python"
PYTHONS ?= $(VENV)/bin/python
across-torch: setup
	python tests/across_torch.py $(PYTHONS)

clean:
	rm -rf build $(VENV) bnext/*.so *.egg-info
