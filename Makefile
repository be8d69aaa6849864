# Everything a developer runs. `make help` lists it; nothing but Python 3.11+ and make is needed.
PYTHON ?= python3
# Where Linux machines get torch without CUDA. An index that does not answer is passed over.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PORT ?= 8080
BENCH ?= peft demo router stall tiers
GPU_OUT ?= build/gpu/out
GPU_PARTS ?= tests linears lora decode prefill transfers capacity http e6 popularity tiers peers
GPU_SHAPES ?= llama-8b mistral-7b
GPU_FLAGS ?= --limit-seconds 480
PYTEST ?= -n 2 --dist loadfile -q

VENV := .venv
BIN := $(VENV)/bin
# -P: the checkout's own proto/, cache/ and kernels/ must not shadow installed packages.
RUN := $(BIN)/python -P
PIP := $(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.stamp
PROTO := proto/shard_pb2.py
LINKS := build/types/lorafleet/.stamp
PACKAGES := proto kernels cache router shard client deploy

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup proto demo serve test tests lint types imports check bench gpu fmt clean
gpu: SHELL := /bin/bash

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(PROTO) ## create .venv with the pinned dependencies and the gRPC code

proto: $(PROTO) ## generate the gRPC code from proto/shard.proto

demo: setup ## build the demo model and adapters, serve them on two shards, show a mixed batch
	@$(RUN) -m lorafleet.deploy.demo

serve: setup ## serve the demo model on PORT (8080) until Ctrl-C
	@$(RUN) -m lorafleet.deploy.demo --build-only
	@exec $(RUN) -m lorafleet.deploy serve --model-id .demo/model --adapter-root .demo/adapters \
	  --num-shard 2 --device cpu --kv-cache-bytes 128MiB --hostname 0.0.0.0 --port $(PORT)

test: setup ## run every test (PYTEST="..." replaces pytest's options)
	@$(RUN) -m pytest $(PYTEST)

tests: test

lint: setup ## ruff: rules and formatting
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

types: setup $(LINKS) ## mypy --strict over the packages and the tests
	@$(BIN)/mypy $(addprefix build/types/lorafleet/,$(PACKAGES)) tests

imports: setup ## import-linter: packages stand on each other one way only
	@mkdir -p build
	@$(BIN)/lint-imports --verbose --no-cache > build/imports.log 2>&1 || { cat build/imports.log; exit 1; }

check: lint types imports test ## what CI runs

bench: setup ## the numbers of docs/benchmarks.md (BENCH="peft demo router stall tiers starvation arena profile")
	@$(BIN)/python -m tests.bench $(BENCH)

gpu: ## tests and benchmarks of this machine's CUDA device, into GPU_OUT; needs no network
	@$(PYTHON) -P tests/bench/gpu/needs.py
	@rm -rf build/gpu/site && mkdir -p build/gpu/path $(GPU_OUT)
	@$(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation --no-compile --target build/gpu/site .
	@ln -sfn $(CURDIR)/tests build/gpu/path/tests
	@export PYTHONUNBUFFERED=1 PYTHONPATH="$(CURDIR)/build/gpu/site:$(CURDIR)/build/gpu/path:$$PYTHONPATH"; \
	  { $(PYTHON) -P -m tests.bench.gpu --out $(GPU_OUT) $(addprefix --shape ,$(GPU_SHAPES)) $(GPU_FLAGS) $(GPU_PARTS); \
	    code=$$?; $(PYTHON) -P -m tests.bench.gpu.plots --out $(GPU_OUT); exit $$code; } 2>&1 \
	  | tee $(GPU_OUT)/log.txt; exit $${PIPESTATUS[0]}

fmt: setup ## sort imports, fix what can be fixed, format
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

clean: ## remove what make made: .venv, the demo model, generated code, caches
	@rm -rf $(VENV) .demo .demo.lock build *.egg-info proto/*_pb2.py proto/*_pb2.pyi proto/*_pb2_grpc.py
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorafleet needs Python 3.11 or newer; set PYTHON=/path/to/python3")'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the pinned dependencies into $(VENV) (the first time: a few minutes)"
	@$(PIP) --retries 0 --extra-index-url $(TORCH_INDEX) torch
	@$(PIP) setuptools grpcio-tools
	@$(RUN) proto/generate.py
	@$(PIP) --no-build-isolation -e '.[test,demo]'
	@touch $@

$(PROTO): proto/shard.proto proto/generate.py | $(INSTALLED)
	@$(RUN) proto/generate.py

# mypy reads no import hooks, so it gets the namespace as a folder of links.
$(LINKS): Makefile
	@mkdir -p $(@D)
	@for package in $(PACKAGES); do ln -sfn ../../../$$package $(@D)/$$package; done
	@touch $@
