# `make demo` and `make test` do the whole set-up by themselves; nothing comes from a model hub.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UI ?= tests/ui
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-reliability test-ui check audit clean

demo: $(VENV)/.ready
	$(BIN)/sbora demo --out outputs/demo

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

test-reliability: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability

test-ui: $(VENV)/.ready-ui
	@$(BIN)/python -m tests.ui.browser
	$(BIN)/python -m pytest $(UI) -m ui

check: $(VENV)/.ready-dev audit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(VENV)/.ready-dev
	@$(BIN)/python scripts/audit_dependencies.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) torch torchvision
	$(PIP) -e '.[ui,eval,lite2]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e '.[ui,eval,lite2,kid,opt,dev]'
	touch $@

$(VENV)/.ready-ui: $(VENV)/.ready-dev
	$(PIP) -e '.[ui-test]'
	touch $@

clean:
	rm -rf $(VENV) outputs dist build/lib
