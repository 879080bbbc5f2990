# `make quickstart` trains a model end to end; `make test` runs what proves the promises.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := install
.PHONY: install quickstart test chaos check fix wheel

install: .venv/installed-dev

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv"
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing what tests and checks need"
	$(PIP) --editable ".[test,dev]"
	@touch $@

quickstart: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" sh configs/quickstart.sh

# Three workers for two cores: one of them usually waits, for a cluster, a hang or a time limit.
test: .venv/installed-dev
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Strikes runs with N faults, e.g. `make chaos N=100 SEED=7`, and tells how each kind was survived.
chaos: .venv/installed-dev
	PYTHONPATH=tests $(BIN)/python -m chaos $(or $(N),100) $(if $(SEED),--seed $(SEED))

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests
	$(BIN)/lint-imports --no-logo
	@git ls-files '*.py' | xargs wc -l | awk '$$1 > 500 && $$2 != "total" { print $$2 ": " $$1 " lines; the limit is 500"; bad = 1 } END { exit bad }'

fix: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Builds the wheel, installs it beside the dependencies, and trains a few steps with it.
wheel: .venv/installed-dev
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .
	PATH="$(CURDIR)/$(BIN):$$PATH" sh .ci/try-wheel dist/*.whl
