# `make demo` and `make test` are all a fresh machine needs; each makes .venv and installs what it uses.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help demo docs notebooks package sanitize test test-examples test-plain test-newest test-library fashion_mnist figures soak lint format clean
# What docstrings, pages and notebooks show. `.ci/run` runs it once, on the newest JAX, which is what users install.
EXAMPLES := tests/test_docstrings.py tests/test_docs.py tests/test_notebooks.py
# The tests of the library itself, without those that train through configs.
LIBRARY_TESTS := $(EXAMPLES) tests/rigl_jax tests/contracts tests/tracing tests/channels tests/execution tests/coreset
# Those of what native kernels do where they are built: sparse products, and the selection of masks. Tests that select in
# plain JAX anyway, marked `eight_devices`, are not repeated.
CORE_TESTS := tests/execution $(addprefix tests/rigl_jax/test_,selection.py pruning.py rigl.py dsr.py)
# Files are spread over the cores; plain `pytest FILE` runs in one process.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
# The newest Python on this machine, on the path or from pyenv, that the newest JAX runs on; empty if there is none.
NEWEST ?= $(shell for minor in 14 13 12; do \
	for python in python3.$$minor $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.$$minor.*/bin/python; do \
	$$python -c '' 2>/dev/null && echo $$python && exit; done; done)
NO_NEWEST := no Python from 3.12 to 3.14 on this machine: the newest JAX is not tested

help:  ## Show this list
	@grep -E '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# One stamp for each set of extras: installed once, and again whenever pyproject.toml changes. A module is compiled to
# bytecode when it is first imported, and kept, whatever the shell says; most modules never are. The project is built beside
# the jaxlib that is there, not in an environment of its own with a second one.
export PYTHONDONTWRITEBYTECODE :=
INSTALL = env PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile
BUILD_REQUIRES = import tomllib; print(*map(repr, tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -c '$(BUILD_REQUIRES)' | xargs $(INSTALL)
	$(INSTALL) --no-build-isolation --editable '.[$(subst -,$(comma),$*)]'
	@touch $@
comma := ,

# The kernels are compiled when the package is installed, and by this where their sources have changed since. Optional:
# without a C++ compiler plain JAX serves.
NATIVE = -@$(BIN)/python rigl_jax/native/build.py

# Native tests on a build that stops at the first read or write out of bounds and the first undefined operation. XLA and
# Python leak on purpose. Tests of the fallback, and of loading, have nothing to find.
sanitize: $(VENV)/installed-experiments-notebooks-tests  ## Run the native tests with the address and undefined-behaviour sanitizers
	$(BIN)/python rigl_jax/native/build.py --sanitize build/sanitize/_native.so
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 RIGL_JAX_NATIVE_LIBRARY=$(CURDIR)/build/sanitize/_native.so \
	  $(BIN)/python -m pytest tests/execution/test_native_linear.py tests/execution/test_native_conv.py \
	  tests/rigl_jax/test_native_select.py tests/execution/test_damaged.py tests/execution/test_sorting.py

demo: $(VENV)/installed-experiments  ## Train a 98 % sparse network with RigL beside its dense, static and SET twins
	$(NATIVE)
	$(BIN)/python -m experiments.demo

test: $(VENV)/installed-experiments-notebooks-tests  ## Run the test suite, without the examples
	$(NATIVE)
	$(PYTEST) $(addprefix --ignore=,$(EXAMPLES))
	@echo "Examples in docstrings, pages and notebooks have a command of their own: make test-examples"

test-examples: $(VENV)/installed-experiments-notebooks-tests  ## Run the examples in docstrings, pages and notebooks
	$(NATIVE)
	$(PYTEST) $(EXAMPLES)

test-plain: $(VENV)/installed-experiments-notebooks-tests  ## Test the core of the library without its native kernels, in plain JAX
	RIGL_JAX_NATIVE=0 $(PYTEST) $(CORE_TESTS)

test-newest:  ## Test the library in .venv-newest, on the newest Python of this machine and the newest JAX
	$(if $(NEWEST),$(MAKE) test-library VENV=.venv-newest PYTHON=$(NEWEST),@echo "$(NO_NEWEST)" && $(MAKE) test-examples)

test-library: $(VENV)/installed-experiments-notebooks-tests
	$(NATIVE)
	$(BIN)/python -c "import sys, jax; print('Python', sys.version.split()[0], 'jax', jax.__version__)"
	$(PYTEST) $(LIBRARY_TESTS)

fashion_mnist: $(VENV)/installed-experiments  ## Import Fashion-MNIST from raw IDX files (IDX=folder) and train on it
	$(NATIVE)
	$(BIN)/python -m experiments.import_idx --name fashion_mnist $(if $(IDX),--source $(IDX))
	$(BIN)/python -m experiments.main --config configs/fashion_mnist_mlp.py --workdir runs/fashion_mnist_mlp/rigl
	$(BIN)/python -m experiments.report runs/fashion_mnist_mlp --out runs/fashion_mnist_mlp

# Pictures of masks in docs/pictures are made by training: `python -m experiments.gallery`.
figures: $(VENV)/installed-experiments  ## Make every table and figure of the results anew from the committed records
	$(BIN)/python -m experiments.report --readme
	$(BIN)/python -m experiments.benchmarks.page
	$(BIN)/python -m experiments.studies.paper_tables
	$(BIN)/python -m experiments.studies.method_page
	$(BIN)/python -m experiments.studies.tuning_page
	$(BIN)/python -m experiments.studies.mnist1d_page
	$(BIN)/python -m experiments.studies.solutions_page
	$(BIN)/python -m experiments.studies.language_page
	$(BIN)/python -m experiments.studies.pruning_page
	$(BIN)/python -m experiments.studies.channels_page
	$(BIN)/python -m experiments.studies.data_page
	$(BIN)/python -m experiments.studies.diagnostics_page

soak: $(VENV)/installed-experiments-notebooks-tests  ## Stop runs 180 times, train 20,000 steps (an hour); writes experiments/records/soak.json
	$(NATIVE)
	SOAK=1 $(BIN)/python -m pytest tests/experiments/test_multihost.py
	$(BIN)/python -m experiments.soak

notebooks: $(VENV)/installed-experiments-notebooks-tests  ## Run the notebooks again and keep their outputs
	$(NATIVE)
	$(BIN)/python docs/_notebooks.py

# Warnings and links that lead nowhere are errors. Nothing but the packages of the extra is fetched.
docs: $(VENV)/installed-docs  ## Build the site of the documentation, build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo built build/site/index.html

# Of the sdist's files: a wheel for this platform, and one for platforms without native kernels.
package: $(VENV)/installed-package  ## Build sdist and wheels into dist/, run the README's ten lines on each in an empty environment
	bash .ci/package $(BIN)/python

lint: $(VENV)/installed-lint $(VENV)/installed-experiments-notebooks-tests  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: $(VENV)/installed-lint  ## Rewrite to the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and caches (never runs/ or data/)
	rm -rf .venv .venv-newest .jax_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
