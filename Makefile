# Two commands do all the set-up on a machine with Python 3.11, pip and make:
#   make demo    installs and runs the whole way on the small checkpoint
#   make test    installs what tests need, checks the code and runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q

.PHONY: demo test lint install clean

demo: $(VENV)/.demo
	$(BIN)/qwen2x demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.test

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.python
	$(PIP) -e ".[cpu,torch,mlx]"
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.python
	$(PIP) -e ".[cpu,torch,mlx,dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
