# Every target sets up what it needs: a .venv made from nothing, renewed when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUNS := .venv/.runs
NEW_VENV := test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --editable

.PHONY: help python setup demo check lint test coverage slow bench docs fmt

help:
	@echo 'make demo    run examples/tasks.jsonl with the agents of examples/agents.py'
	@echo 'make test    the tests'
	@echo 'make check   what a change must pass: linters, types, import directions, tests'
	@echo 'make coverage   the tests, with the share of lines and branches that they run, by folder'
	@echo 'make slow    the tests that take longer'
	@echo 'make bench   what the loop costs beside the bus alone; takes about half an hour, on a machine without other work'
	@echo 'make docs    build the pages and the API reference as a site in build/site'
	@echo 'make fmt     format the code'
	@echo 'make setup   only prepare .venv'

setup: $(READY)

python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=…")'

$(READY): pyproject.toml | python
	$(NEW_VENV)
	$(INSTALL) '.[dev]'
	@touch $@ $(RUNS)

# What loom itself needs, and a server: no linters, no test tools.
$(RUNS): pyproject.toml | python
	$(NEW_VENV)
	$(INSTALL) '.[embedded,fast]'
	@touch $@

demo: $(RUNS)
	$(BIN)/loom run examples/tasks.jsonl --agents examples/agents.py

check: lint test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/agents.py examples/report.py
	$(BIN)/mypy tests/typing/public_api.py
	$(BIN)/lint-imports

test: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal

coverage: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=
	@for room in schemas bus agents phases runner loom; do \
	  printf '%-8s %3s %%\n' $$room "$$($(BIN)/coverage report --include="$$room/*" --format=total)"; done
	@printf '%-8s %3s %%\n' all "$$($(BIN)/coverage report --format=total)"

slow: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal --timeout 180 -m 'slow and not container'

bench: .venv/.bench
	$(BIN)/python tests/bench/costs.py --rounds 1
	$(BIN)/python tests/bench/loop.py
	$(BIN)/python tests/bench/scales.py

.venv/.bench: $(READY)
	$(INSTALL) '.[bench]'
	@touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

.venv/.docs: $(READY)
	$(INSTALL) '.[docs]'
	@touch $@

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
