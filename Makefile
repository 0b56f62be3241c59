# Needs Python 3.11 or newer and make, nothing else. Everything is installed into .venv, once: a
# second call finds the stamp files and goes straight to work. Override: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/.installed
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev

.PHONY: quickstart test test-fast lint clean

# The whole experiment in a miniature world: no download, results in quickstart_results/.
# Another world: make quickstart ARGS=--world=1
quickstart: $(RUN)
	$(VENV)/bin/panacea quickstart --workdir=quickstart_results $(ARGS)

# Every test. One file: make test ARGS=tests/test_cli.py
test: $(TEST)
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -q -n auto --dist loadfile $(ARGS)

# Without the tests that take more than 20 s.
test-fast: $(TEST)
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -q -n auto --dist loadfile -m "not slow" $(ARGS)

lint: $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# What make and the tools left behind; results stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Editable, so that a change of the code needs no new installation; a change of pyproject.toml does.
$(RUN): pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), once; this takes minutes"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(TEST): pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), once; this takes minutes"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(RUN)

$(DEV): pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), once; this takes minutes"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(TEST) $(RUN)
