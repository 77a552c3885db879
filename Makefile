# Two commands from a bare machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types bench bench-train clean

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/anysize demo

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.startup.run
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.exactness.run
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.planning.run
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.conversion.run

bench-train: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.calibration.run
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.fitting.run
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.throughput.run
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.train.run

# The constraints pin every package; torch comes first, so that no other package pulls in another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist demo-output src/*.egg-info
