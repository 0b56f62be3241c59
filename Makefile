# Needs Python 3.11 or newer and make, nothing else. Everything is installed into .venv, once: a
# second call finds the stamp files and goes straight to work. Override: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/.installed
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev
SUPPLY := $(VENV)/supply/bin

.PHONY: quickstart test test-all fuzz faults kills counts lint docs lock licences sbom audit clean

# The whole experiment in a miniature world: no download, results in quickstart_results/.
# Another world: make quickstart ARGS=--world=1
quickstart: $(RUN)
	$(VENV)/bin/panacea quickstart --workdir=quickstart_results $(ARGS)

# What tests compile is kept for the next call.
PYTEST = JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

# What every change has to pass. One file: make test ARGS=tests/test_cli.py
test: $(TEST)
	$(PYTEST) -m "not slow" $(ARGS)

# Every test, compiled as for use; tests/slow.txt says what test leaves out.
test-all: $(TEST)
	XLA_FLAGS=--xla_cpu_multi_thread_eigen=false $(PYTEST) $(ARGS)

# Random input to every parser of strangers' files, under a limit of memory: make fuzz ARGS=--inputs=1000
fuzz: $(TEST)
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m tests.fuzz $(ARGS)

# A thousand flipped bits and cut files in a finished work directory: what becomes of each.
faults: $(TEST)
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m tests.faults 1000 $(ARGS)

# Two hundred SIGKILLs at random instants of whole runs of three methods, a comparison and a sweep: an hour.
kills: $(TEST)
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m tests.kills 200 $(ARGS)

# What compiled steps compute, move, send and hold, counted anew: for a change that is meant to change it.
counts: $(TEST)
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m tests.planning.test_counts

lint: $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The site, in build/site; a warning is an error.
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

# Exact versions of what a fresh environment gets, with hashes.
lock: $(DEV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check pip-tools
	$(VENV)/bin/pip-compile --quiet --generate-hashes --no-emit-options --strip-extras --no-header \
	    --output-file=requirements.txt pyproject.toml

# What the locked packages are: their licences, a bill of materials (CycloneDX), and advisories against them. All of it goes to build/,
# since it may name hosts. Nothing of these tools shares an environment with what they look at.
licences: $(TEST)
	mkdir -p build
	$(VENV)/bin/python -m tests.supply > build/licences.md

sbom: $(SUPPLY)/pip-audit
	mkdir -p build
	$(SUPPLY)/cyclonedx-py requirements --pyproject=pyproject.toml --output-reproducible --output-file=build/sbom.json requirements.txt

# An advisory is an error; where nobody answers, the last line says that nothing was audited.
audit: $(TEST) $(SUPPLY)/pip-audit
	mkdir -p build; rm -f build/audit.json
	-$(SUPPLY)/pip-audit --disable-pip --require-hashes --progress-spinner=off --format=json --output=build/audit.json --requirement=requirements.txt \
	    2> build/audit.log
	$(VENV)/bin/python -m tests.supply build/audit.json

# What make and the tools left behind; results stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .cache .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# What the package needs to run, in the versions of requirements.txt, which are of Python 3.11; later ones take what pyproject.toml allows.
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
LOCKED := if $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; \
	  then $(PIP) install --require-hashes -r requirements.txt; fi

# Editable, so that a change of the code needs no new installation; a change of pyproject.toml does.
$(RUN): pyproject.toml requirements.txt | $(VENV)/bin/python
	@echo "installing into $(VENV), once; this takes minutes"
	@$(LOCKED)
	$(PIP) install -e .
	touch $@

$(TEST): pyproject.toml requirements.txt | $(VENV)/bin/python
	@echo "installing into $(VENV), once; this takes minutes"
	@$(LOCKED)
	$(PIP) install -e '.[test]'
	touch $@ $(RUN)

$(DEV): pyproject.toml requirements.txt | $(VENV)/bin/python
	@echo "installing into $(VENV), once; this takes minutes"
	@$(LOCKED)
	$(PIP) install -e '.[dev]'
	touch $@ $(TEST) $(RUN)

$(SUPPLY)/pip-audit: | $(VENV)/bin/python
	$(VENV)/bin/python -m venv $(VENV)/supply
	$(SUPPLY)/python -m pip --quiet --disable-pip-version-check install 'cyclonedx-bom>=7.5,<8' 'pip-audit>=2.10,<3'
