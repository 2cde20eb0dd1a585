# `make demo` and `make test` are all the set-up there is.
PYTHON ?= python3
VENV := .venv
MINUTES ?= 10

.PHONY: demo test lint install clean browser
demo: $(VENV)/.installed
	$(VENV)/bin/onestroke demo --minutes $(MINUTES)

test: $(VENV)/.installed-test browser
	$(VENV)/bin/ruff check src tests examples
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

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

# The studio's test needs Chromium and skips, visibly, where there is none and none can be installed.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { [ "$$(id -u)" = 0 ] \
	  && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	  || echo "no Chromium: the studio's test will be skipped"

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff format --check src tests examples
	$(VENV)/bin/ruff check src tests examples

clean:
	rm -rf $(VENV) build dist
