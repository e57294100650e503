# The four words to remember: make demo, make test, make check, make protos.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check protos clean

demo: $(INSTALLED)
	$(BIN)/gradbank demo

test: $(INSTALLED)
	$(BIN)/pytest -q -n 2

check: $(INSTALLED) .venv-protos/.installed
	$(BIN)/ruff format --check client server tests benchmarks examples
	$(BIN)/ruff check client server tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	rm -rf .venv-protos/made && protos/generate.sh .venv-protos/made
	diff -r -x __pycache__ .venv-protos/made/gradbank/v1 client/gradbank/v1 && echo "stubs are up to date"

protos: .venv-protos/.installed
	protos/generate.sh

clean:
	rm -rf $(VENV) .venv-protos

# torch comes first and alone: its pin in constraints.txt chooses a build, and the line says why the wait
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): torch first (a few minutes), then gradbank and its tools ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	@echo "... torch is there, now the rest ..."
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

.venv-protos/.installed: protos/requirements.txt
	$(PYTHON) -m venv .venv-protos
	.venv-protos/bin/pip install -q --disable-pip-version-check -r protos/requirements.txt
	@touch $@
