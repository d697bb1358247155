# `make demo` and `make test` do everything, set-up included.
#
# MODEL (a checkpoint folder or a hub id), TARGET, METHOD, GROUP, CALIBRATION and ENGINE choose what `build-engine`,
# `serve` and `triton` work on; scripts/make_engine.py gives the defaults. Recipes read them from the environment, so
# that paths may contain spaces.

PYTHON ?= python3
SHAPE ?= 8b
AUDITED ?= engines/random-$(SHAPE)
export MODEL TARGET METHOD GROUP CALIBRATION ENGINE SHAPE AUDITED

VENV := .venv
BIN := $(VENV)/bin
TRITON := .triton
DYNAMO := .dynamo
PEERS := .peers

MAKE_ENGINE = $(BIN)/python -m scripts.make_engine
CHOSEN_ENGINE = $(MAKE_ENGINE) --model "$$MODEL" --engine "$$ENGINE" --target "$$TARGET" --method "$$METHOD" \
	--group "$$GROUP" --calibration "$$CALIBRATION"
TINY_ENGINE = $(MAKE_ENGINE) --model checkpoints/tiny --engine engines/tiny-cpu --weights

.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.package ## Make .venv, with trimode and everything that the other targets need

demo: $(VENV)/.package ## Quantise the shipped checkpoint, build its engine, answer prompts in every mode
	@$(TINY_ENGINE) >/dev/null
	@$(BIN)/python -m scripts.demo engines/tiny-cpu

build-engine: $(VENV)/.package ## Quantise MODEL and build ENGINE for TARGET
	@engine="$$($(CHOSEN_ENGINE))" && $(BIN)/trimode info "$$engine"

serve: $(VENV)/.package ## Serve ENGINE over the OpenAI API on port 8000, with the playground at /
	@engine="$$($(CHOSEN_ENGINE) --existing)" && exec $(BIN)/trimode serve "$$engine"

triton: $(VENV)/.package $(TRITON)/.package ## Serve ENGINE by a tritonserver on the CPU, ports 8000 to 8002; STREAM=1 streams
	@engine="$$($(CHOSEN_ENGINE) --existing)" && \
		exec $(TRITON)/bin/python -m scripts.serving.triton_server "$$engine" $(if $(STREAM),,--no-decoupled)

triton-environment: $(TRITON)/.package ## Make .triton, in which `make triton` and its tests run

dynamo: $(VENV)/.package $(DYNAMO)/.package ## Serve ENGINE by Dynamo's frontend on port 8000 and two workers, on the CPU
	@engine="$$($(CHOSEN_ENGINE) --existing)" && exec $(DYNAMO)/bin/python -m scripts.serving.dynamo_cluster "$$engine"

dynamo-environment: $(DYNAMO)/.package ## Make .dynamo, in which `make dynamo` and its tests run (700 MB)

dynamo-check: $(VENV)/.package $(DYNAMO)/.package ## Prove answers, routing and migration with two workers (30 minutes)
	@$(TINY_ENGINE) >/dev/null
	@$(BIN)/python -m scripts.serving.dynamo_check engines/tiny-cpu

browser: ## Install Debian's Chromium for the playground's tests (as root)
	@command -v chromium chromedriver >/dev/null || \
		(apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium chromium-driver >/dev/null)

test: lint types docs $(TRITON)/.package ## Set-up, lint, types, the documentation site and all tests
	@$(MAKE) --no-print-directory browser 2>/dev/null || echo "no browser could be installed: its tests are skipped"
	TRIMODE_NEED_TRITON=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.package ## Ruff, import rules, Dockerfiles, compose files, GitHub's files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile deploy/dynamo/Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml deploy/dynamo/compose.yaml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

types: $(VENV)/.package ## mypy on the package
	$(BIN)/mypy -p trimode

docs: $(VENV)/.package ## Build the documentation site into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.package ## Build the sdist and the wheel into dist/, with the decoding loop compiled (needs a C compiler)
	@rm -rf dist
	@env -u PYTHONPATH TRIMODE_COMPILE=1 $(BIN)/pyproject-build --no-isolation --outdir dist . >/dev/null
	@ls dist

wheel-test: wheel ## Install the wheel alone in a fresh environment and compare its answers with the working tree's
	@$(BIN)/python -m scripts.check_wheel dist

prove: $(VENV)/.package ## Compare the engines with the PyTorch reference: first table of docs/results.md
	@$(BIN)/python -m scripts.prove.engines

prove-runtime: $(VENV)/.package ## Check the runtime with many requests at once: second table of docs/results.md
	@$(TINY_ENGINE) >/dev/null
	@$(BIN)/python -m scripts.prove.runtime engines/tiny-cpu --checkpoint engines/tiny-w4a16-awq64

bench: $(VENV)/.package ## Measure tokens per second by mode and load, against the PyTorch reference
	@$(TINY_ENGINE) >/dev/null
	@$(BIN)/python -m scripts.bench.modes engines/tiny-cpu --checkpoint engines/tiny-w4a16-awq64 --plot engines/bench.png

audit: $(VENV)/.package ## Build the 8B shape with random weights for rtx and audit it (20 GB of disk, 23 GiB of memory)
	@test -e "$$AUDITED/config.json" || $(BIN)/python -m scripts.gpu.random_w4a16_checkpoint "$$SHAPE" "$$AUDITED"
	@test -e "$$AUDITED-rtx/manifest.json" || \
		$(BIN)/trimode build "$$AUDITED" "$$AUDITED-rtx" --target rtx --sm 121,120,89 --capacity 32768
	@$(BIN)/trimode audit "$$AUDITED-rtx" --window 512,4096,32768 --plot "$$AUDITED-rtx.png"

kernels: $(VENV)/.package ## Print the GPU kernels' traffic, estimated times and registers (10 minutes)
	@$(BIN)/python -m scripts.gpu.kernel_table traffic
	@$(BIN)/python -m scripts.gpu.cycle_estimate
	@$(BIN)/python -m scripts.gpu.kernel_table resources

peers: $(VENV)/.package $(PEERS)/.package ## Compare passes on this CPU with llama.cpp's (30 minutes, 8 GB of memory, 20 GB of disk)
	@$(BIN)/python -m scripts.bench.peers

train-tiny: $(VENV)/.package ## Train the shipped checkpoint again from its seed (about an hour)
	$(BIN)/python -m scripts.tiny.train --out engines/tiny-trained

clean: ## Remove environments, engines and caches
	rm -rf $(VENV) $(TRITON) $(DYNAMO) $(PEERS) .clients engines site dist .gpu .setuptools .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis .import_linter_cache

# Installed in place: every tool sees each change of the working tree. Without [tensorrt], gigabytes that only a
# machine with a GPU can use: the tests need only its bindings, which [dev] has.
$(VENV)/.package: pyproject.toml trimode/__init__.py common/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[build,cuda,rtx,serve,mpi,dev,docs]'
	@touch $@

# An environment of its own: the Python backend needs numpy 1.
# llama.cpp is compiled from its source: some minutes, and a C++ compiler.
$(PEERS)/.package: Makefile
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet 'llama-cpp-python>=0.3.36,<0.4' 'gguf>=0.17,<1' numpy
	@touch $@

# An environment of its own: Dynamo pins pydantic. Of the packages that ai-dynamo requires, a worker and a frontend need
# only those in the extra; others download from indexes of their own.
$(DYNAMO)/.package: pyproject.toml trimode/__init__.py common/version.py
	$(PYTHON) -m venv $(DYNAMO)
	$(DYNAMO)/bin/python -m pip install --quiet --upgrade pip
	$(DYNAMO)/bin/python -m pip install --quiet --editable '.[dynamo]'
	$(DYNAMO)/bin/python -m pip install --quiet --no-deps ai-dynamo==1.6.1
	@touch $@

$(TRITON)/.package: pyproject.toml trimode/__init__.py common/version.py
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --upgrade pip
	$(TRITON)/bin/python -m pip install --quiet --editable '.[triton]'
	@touch $@

.PHONY: help setup demo audit kernels build-engine serve triton triton-environment dynamo dynamo-environment dynamo-check browser test lint types docs wheel wheel-test prove prove-runtime bench peers train-tiny clean
