# Everything runs from .venv, made on first use and brought up to date when pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --editable

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/python -m planner.cli.demo

# Two files of tests at a time. Threads that wait leave the processor to the other.
test: .venv/installed-dev
	GOMP_SPINCOUNT=0 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv puts there: without it, an earlier attempt stopped half way.
$(BIN)/pip:
	$(PYTHON) -m venv --clear .venv

.venv/installed: pyproject.toml | $(BIN)/pip
	$(INSTALL) .
	touch $@

.venv/installed-dev: pyproject.toml | $(BIN)/pip
	$(INSTALL) '.[dev]'
	touch .venv/installed $@
