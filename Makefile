# Every target makes its own environment in $(VENV) from a bare python3, and builds what changed:
#   make demo                bnext against eager PyTorch, then a network trained on real data
#   make test                the tests
#   make test TORCH=torch    with the newest torch, or with any other pip can install
PYTHON ?= python3
VENV ?= .venv
# What CI tests and what the figures were measured with.
TORCH ?= torch==2.13.0
# CUDA kernels where a GPU is seen; 0 and 1 as in setup.py.
export BNEXT_CUDA ?= gpu
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build test demo bench-quick lint types format sanitize wheels torch clean FORCE

help:
	@sed -n '2,4s/^# *//p' Makefile
	@echo "also: build lint types format sanitize wheels clean"

# Holds the choice of torch: a different one makes the set-up run again.
$(VENV)/torch-choice: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

define CHECK_PYTHON
import sys
if sys.version_info < (3, 10):
    sys.exit("bnext needs Python 3.10 or newer, and $(PYTHON) is %d.%d: PYTHON=... names another."
             % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("$(PYTHON) cannot make a virtual environment: apt install python3-venv (Debian, Ubuntu).")
endef
export CHECK_PYTHON

define ANNOUNCEMENT
bnext: $(TORCH) and what this target needs go into $(VENV), then the C++ is compiled.
  torch    as PyPI has it for x86-64, with the libraries of CUDA: 2.6 GB to download, 4.8 GB on disk;
           as a build for the CPU alone, if pip is given an index that has one: 0.2 and 0.9 GB
  others   0.2 GB to download, 0.5 GB on disk
  compile  3 minutes on 2 cores, 4 more where there is a GPU and nvcc; then the demo takes 2 minutes,
           the tests 12, or 19 where nvcc is found
endef
export ANNOUNCEMENT

# What the build needs: torch last, since only it takes long.
$(VENV)/ready: pyproject.toml $(VENV)/torch-choice
	@test -x $(VENV)/bin/pip || $(PYTHON) -c "$$CHECK_PYTHON"
	$(if $(filter %/torch-choice,$?),@echo "$$ANNOUNCEMENT")
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	python -m pip install "setuptools>=77" "pybind11>=2.13" ninja
	@python -c "import setup; setup.check_tools()"
	python -m pip install --upgrade "$(TORCH)"
	@touch $@

build: $(VENV)/ready
	python setup.py -q build_ext --inplace

# What an extra of pyproject.toml adds, and the version of bnext/__init__.py. bnext is built by then,
# so pip has nothing to compile.
EXTRAS = $(addprefix $(VENV)/with-,bench test lint release)
$(EXTRAS): $(VENV)/with-%: $(VENV)/ready bnext/__init__.py | build
	python -m pip install --no-build-isolation -e ".[$*]"
	@touch $@

demo: build $(VENV)/with-bench
	python -m benchmarks demo
	python -m benchmarks train

# Files of tests run side by side; threads must not spin while they wait for a core.
SIDE_BY_SIDE = -n auto --maxprocesses 8 --dist loadfile
test: build $(VENV)/with-test
	OMP_WAIT_POLICY=PASSIVE python -m pytest $(or $(PYTEST_ARGS),$(SIDE_BY_SIDE))

bench-quick: build $(VENV)/with-bench
	python -m benchmarks --quick

PYTHON_FILES = bnext tests $(wildcard benchmarks) setup.py _backend.py
CXX_FILES = $(shell git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')

lint: $(VENV)/with-lint
	ruff check $(PYTHON_FILES)
	ruff format --check $(PYTHON_FILES)
	clang-format --dry-run -Werror $(CXX_FILES)

types: $(VENV)/with-lint
	mypy

format: $(VENV)/with-lint
	ruff check --fix-only $(PYTHON_FILES)
	ruff format $(PYTHON_FILES)
	clang-format -i $(CXX_FILES)

# The C++ under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/with-test
	tests/sanitize.sh $(PYTEST_ARGS)

# The sdist and the wheels, tested: make wheels WHEELS_ARGS="python3.11 --under a/bin/python"
# The release tools bring nvcc where there is none, so what is built for them does without.
wheels:
	$(MAKE) $(if $(shell command -v nvcc),,BNEXT_CUDA=0) $(VENV)/with-release
	python tests/packaging/wheels.py --torch "$(TORCH)" $(WHEELS_ARGS)

# What .ci/run holds pip to.
torch:
	@echo "$(TORCH)"

clean:
	rm -rf build $(VENV) bnext/*.so *.egg-info
