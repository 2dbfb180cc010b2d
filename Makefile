# make demo, make test: both make their own virtual environment in .venv and need only python3 (3.10 or newer, with venv).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py constraints.txt $(shell find disa_fast -type f -not -path '*/__pycache__/*')

.PHONY: demo test lint format bench clean

demo: $(INSTALLED)
	$(BIN)/disa-fast demo

test: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes bench/results/mlp_head.json; look at the ratios, never at the times of another machine.
bench: $(INSTALLED)
	$(BIN)/pytest bench/bench_mlp_head.py --benchmark-only --benchmark-json=bench/results/mlp_head.json

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt '.[demo,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
