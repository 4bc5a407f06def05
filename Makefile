# Commands for contributors; `make help` lists them.
BIN ?= .venv/bin
COUNT ?= 20
FAST := tests/core tests/foundation tests/runtime tests/test_tidy.py tests/test_layers.py tests/test_statements.py tests/test_readme.py
.DEFAULT_GOAL := help
.PHONY: help setup check test journeys chaos simulate bench

help:      ## list the targets
	@sed -n 's/^\([a-z]*: *\)## /make \1/p' $(MAKEFILE_LIST)
setup:     ## create a virtual environment for development
	python3 -m venv .venv && $(BIN)/pip install --quiet -e '.[dev]'
check:     ## format, lint, types, layers, layout, fast tests: under a minute
	$(BIN)/ruff format --check && $(BIN)/ruff check && $(BIN)/mypy && $(BIN)/lint-imports && $(BIN)/python .ci/layout.py && $(BIN)/pytest -q -n 3 $(FAST)
test:      ## run all tests, with the journeys
	$(BIN)/pytest -q -n 3 -m 'journey or not journey'
journeys:  ## kill real processes COUNT times
	HEADRACE_TEST_COUNT=$(COUNT) $(BIN)/pytest -q -m journey
chaos:     ## kill workers, producer and database for MINUTES, or by the random numbers of SEED=n
	HEADRACE_TEST_MINUTES=$(or $(MINUTES),5) $(if $(SEED),HEADRACE_TEST_SEED=$(SEED)) $(BIN)/pytest -q -s -m journey tests/journeys/test_chaos.py
simulate:  ## simulate COUNT groups of processes, or only SEED=n
	HEADRACE_TEST_SEED=$(or $(SEED),0) HEADRACE_TEST_COUNT=$(if $(and $(SEED),$(filter file,$(origin COUNT))),1,$(COUNT)) \
	$(BIN)/pytest -q -s tests/simulation -k test_nothing_is_lost
bench:     ## measure the figures, each with its baseline
	$(BIN)/headrace bench
