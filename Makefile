# `make demo` and `make test` are all the set-up there is.
PYTHON ?= python3
VENV := .venv
MINUTES ?= 10

.PHONY: demo test lint install clean
demo: $(VENV)/.installed
	$(VENV)/bin/onestroke demo --minutes $(MINUTES)

test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check src tests examples
	$(VENV)/bin/python -m pytest

install: $(VENV)/.installed

# PyTorch first and by its exact version: plain `torch` can bring another build with gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff format --check src tests examples
	$(VENV)/bin/ruff check src tests examples

clean:
	rm -rf $(VENV) build dist
