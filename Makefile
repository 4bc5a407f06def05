# What a contributor types; `make help` lists it all.
BIN ?= .venv/bin
COUNT ?= 20
FAST := tests/core tests/foundation tests/runtime tests/test_tidy.py tests/test_layers.py tests/test_statements.py tests/test_readme.py
.DEFAULT_GOAL := help
.PHONY: help setup check test journeys chaos simulate bench

help:      ## list what can be made
	@sed -n 's/^\([a-z]*: *\)## /make \1/p' $(MAKEFILE_LIST)
setup:     ## a virtual environment with everything for development
	python3 -m venv .venv && $(BIN)/pip install --quiet -e '.[dev]'
check:     ## format, lint, types, layers, layout, fast tests: under a minute
	$(BIN)/ruff format --check && $(BIN)/ruff check && $(BIN)/mypy && $(BIN)/lint-imports && $(BIN)/python .ci/layout.py && $(BIN)/pytest -q -n 3 $(FAST)
test:      ## every test, journeys included
	$(BIN)/pytest -q -n 3 -m 'journey or not journey'
journeys:  ## real processes, killed COUNT times
	HEADRACE_TEST_COUNT=$(COUNT) $(BIN)/pytest -q -m journey
chaos:     ## workers, producer and database killed for MINUTES, or as SEED=n chose
	HEADRACE_TEST_MINUTES=$(or $(MINUTES),5) $(if $(SEED),HEADRACE_TEST_SEED=$(SEED)) $(BIN)/pytest -q -s -m journey tests/journeys/test_chaos.py
simulate:  ## COUNT worlds of simulated processes, or just SEED=n
	HEADRACE_TEST_SEED=$(or $(SEED),0) HEADRACE_TEST_COUNT=$(if $(and $(SEED),$(filter file,$(origin COUNT))),1,$(COUNT)) \
	$(BIN)/pytest -q -s tests/simulation -k test_nothing_is_lost
bench:     ## the figures, each with its baseline
	$(BIN)/headrace bench
