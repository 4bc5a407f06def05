# What a contributor types; `make help` lists it all.
BIN ?= .venv/bin
COUNT ?= 20
.DEFAULT_GOAL := help
.PHONY: help setup check test journeys bench demo clean

help:      ## list what can be made
	@sed -n 's/^\([a-z]*: *\)## /make \1/p' $(MAKEFILE_LIST)
setup:     ## a virtual environment with everything for development
	python3 -m venv .venv && $(BIN)/pip install --quiet -e '.[dev]'
check:     ## format, lint, types, floors, fast tests: under a minute
	$(BIN)/ruff format --check && $(BIN)/ruff check && $(BIN)/mypy && $(BIN)/lint-imports && $(BIN)/pytest -q -m 'not journey'
test:      ## every test, journeys included
	$(BIN)/pytest -q
journeys:  ## real processes, killed COUNT times
	HEADRACE_TEST_COUNT=$(COUNT) $(BIN)/pytest -q -m journey
bench:     ## the figures, beside their floors
	$(BIN)/python -m bench.floors.sqlite_floor && $(BIN)/headrace bench
demo:      ## the main job on real input
	$(BIN)/headrace demo
clean:     ## remove what was made
	rm -rf .venv .venv-test .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
