# `make demo` and `make test` do their own set-up in .venv, once. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint bench clean

demo: $(VENV)/installed  ## sample the toy models
	bash inference.sh
	$(BIN)/python tools/contact_sheet.py outputs/toy outputs/toy_i2v --out outputs/demo.png

test: $(VENV)/installed-dev  ## run all tests
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/installed-dev  ## time network and VAE against diffusers
	$(BIN)/python -m benchmarks.bench

clean:
	rm -rf $(VENV) outputs *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or 3.12 is needed: make PYTHON=python3.11" if not (3, 11) <= sys.version_info[:2] < (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e '.[dev,diffusers]'
	touch $(VENV)/installed $@
