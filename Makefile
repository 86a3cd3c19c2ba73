# Needs Python 3.11 and make. Everything is installed into .venv, nothing outside of it.
#   make demo        train, quantize and verify a network for handwritten digits (a minute)
#   make test        the fast tests           make test-slow   the others, but for the longest
#   make test-long   three recipes from end to end, which take minutes each
#   make lint        style and types          make check       all of these, and line coverage
#   make docs        the documentation's site, into site/; warnings are errors
#   make clean       remove what these made

PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# More arguments for pytest: make test PYTEST_FLAGS="-n 2 -k numerics"
# (-n 2 is not the default: worker processes write log lines behind pytest's last one.)
PYTEST_FLAGS ?=
# make check COVERAGE= counts no lines, and takes two thirds of the time for the fast tests.
COVERAGE ?= --cov=kqat --cov=tflite_export --cov-fail-under=90

export TF_CPP_MIN_LOG_LEVEL ?= 3
MAKEFLAGS += --no-print-directory

.PHONY: demo test test-slow test-long lint docs check clean

demo: $(READY)
	$(PY) -m recipes.digits --out out/digits

test: $(READY)
	$(PY) -m pytest -m "not slow" $(PYTEST_FLAGS)

test-slow: $(READY)
	$(PY) -m pytest -m "slow and not long" $(PYTEST_FLAGS)

test-long: $(READY)
	$(PY) -m pytest -m long $(PYTEST_FLAGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy kqat tflite_export recipes

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	$(PY) -m codespell_lib

# Line coverage is that of the fast tests: counting lines makes tests longer, and slow ones are long.
check: lint docs
	$(MAKE) test PYTEST_FLAGS="$(PYTEST_FLAGS) $(COVERAGE)"
	$(MAKE) test-slow

clean:
	rm -rf $(VENV) out build dist site .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		*.egg-info

$(READY): setup.py pyproject.toml
	@echo "Installing kqat and its tools into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
