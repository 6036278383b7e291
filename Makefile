PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# The one a CPU build of torch goes with; a CUDA build brings its own.
TRITON ?= triton==3.6.0

# With nvcc, with a host compiler alone, and without a library.
WHEELS ?= nvcc host pure
# The oldest supported torch, the one that is developed on and the newest: csrc/ has to compile against their headers.
HEADERS ?= 2.11.0 2.13.0 2.14.1

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed
TORCH_INSTALLED = $(VENV)/.torch-installed

.DEFAULT_GOAL := help
.PHONY: help install train test wheels headers check bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) WHEELS=\"$(WHEELS)\" HEADERS=\"$(HEADERS)\""

install: $(INSTALLED) ## make $(VENV) with torch, the package (editable, csrc/ compiled) and the tools

train: install ## train the demo model, then write its report
	$(VENV)/bin/torchrun --standalone --nproc-per-node=1 -m atat_fast.train

# Without compiled modules each of some hundred processes would compile the package anew.
test: export PYTHONDONTWRITEBYTECODE =
test: install ## run all tests that need no GPU, slow ones too
	$(VENV)/bin/pytest -m "not gpu" --durations=20

wheels: install ## build the wheels named in WHEELS and run the quick tests on each, about 3 minutes a wheel
	$(VENV)/bin/python tests/packaging/suite_on_wheels.py --wheels $(WHEELS)

headers: install ## compile csrc/ against the torch releases in HEADERS; their wheels are fetched once, into .torch-headers
	$(VENV)/bin/python tests/packaging/build_on_headers.py $(HEADERS)

check: install ## lint, formatting, types, the order of imports and that they have no circle, and README's figures
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/python tests/packaging/import_circles.py
	$(VENV)/bin/python bench/report.py --check

bench: install ## measure training throughput on this machine
	$(VENV)/bin/python bench/throughput.py

clean: ## remove build products and caches; the virtual environment and runs stay
	rm -rf build dist *.egg-info atat_fast/libatat_fast.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(INSTALLED)

# torch comes first and by itself: the package builds against it, and its exact pin decides which build of it is taken.
$(TORCH_INSTALLED): constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else \
	  "atat_fast needs Python 3.11 or 3.12 and $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v)'
	@echo "Making $(VENV) with $(TORCH): a minute, or more where a CUDA build is downloaded"
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  echo "$(PYTHON) has no ensurepip, so its own pip fills $(VENV)"; \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install -q pip; }
	$(PIP) install -q -c constraints.txt '$(TORCH)' numpy setuptools
	@$(VENV)/bin/python -c 'import triton' 2>/dev/null || { set -x; $(PIP) install -q '$(TRITON)'; }
	@touch $@

$(INSTALLED): $(TORCH_INSTALLED) pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	@echo "Installing atat_fast, its dependencies and its tools"
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(VENV)/bin/python -c 'from atat_fast.ops import library; \
	  print(library.problem() or "The compiled library is built, with flags %d" % library.build_flags())'
	@touch $@
