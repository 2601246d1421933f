# Everything runs in .venv, which is made by the first target that needs it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-slow conformance lint format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(VENV)/installed  ## build, train, save and talk to a small VisualChat (outputs/demo)
	python examples/demo.py

test: $(VENV)/installed  ## the tests
	python -m pytest -m "not slow"

test-slow: $(VENV)/installed  ## the tests that take longer
	python -m pytest -m slow

conformance: $(VENV)/installed  ## transformers' own test suite on our classes
	python tests/conformance/run.py

lint: $(VENV)/installed  ## what continuous integration checks first
	ruff check .
	ruff format --check .

format: $(VENV)/installed  ## mend what lint finds
	ruff check --fix .
	ruff format .

clean:  ## remove the environment and all output
	rm -rf $(VENV) .conformance outputs

# torch comes first: any other order may pull the build with CUDA, gigabytes of it
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --constraint constraints.txt torch
	python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
