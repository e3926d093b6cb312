# 'make demo' and 'make test' need Python 3.11 or newer and nothing else; everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test check docs dist clean

help:
	@echo "make demo   run the main example: four rules on 100 phones, a report in runs/digits"
	@echo "make test   run the tests"
	@echo "make check  formatting, lint and types"
	@echo "make docs   build the documentation into site/"
	@echo "make dist   build the wheel and the source archive into dist/"
	@echo "make clean  remove what was built, and .venv"

demo: $(VENV)/.run
	$(BIN)/hanse run examples/digits.toml

# One thread an operation: two test processes with a thread per core each would wait for one another.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A stamp for each set of packages: installing again only when what is asked for has changed.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " \
	  + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing into $(VENV); torch is large, this may take some minutes"
	$(INSTALL) --editable .
	@touch $@

# byzfl, which the tests judge robust rules by, asks for torchvision, of which it needs nothing here.
$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps byzfl
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(INSTALL) --editable '.[docs]'
	@touch $@
