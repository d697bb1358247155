# Two commands do everything, set-up included: `make demo` and `make test`.

PYTHON ?= python3
MODEL ?= checkpoints/tiny
TARGET ?= cpu
METHOD ?= awq
CALIBRATION ?=
NAME = $(notdir $(patsubst %/,%,$(MODEL)))
# The shipped model is 256 wide: groups of 128 would be halves of it.
GROUP ?= $(if $(filter tiny,$(NAME)),64,128)
SHAPE ?= 8b
AUDITED ?= engines/random-$(SHAPE)
ENGINE ?= engines/$(NAME)-$(TARGET)
QUANTIZED ?= engines/$(NAME)-w4a16-$(METHOD)$(GROUP)
# None of a hub id. The folders among them tell of files that have gone.
MODEL_FILES = $(wildcard $(MODEL) $(MODEL)/* $(MODEL)/*/*)
IS_INT4 = $(wildcard $(MODEL)/hf_quant_config.json)
# An engine that was named is served as it is.
SERVED = $(if $(and $(filter-out file,$(origin ENGINE)),$(wildcard $(ENGINE)/manifest.json)),,$(ENGINE)/manifest.json)

VENV := .venv
BIN := $(VENV)/bin
TRITON := .triton

.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.package ## Make .venv and install trimode with everything the other targets need

demo: $(VENV)/.package ## Quantise the shipped checkpoint, build its engines, answer prompts in every mode
	@$(MAKE) --no-print-directory engines/tiny-cpu/manifest.json ENGINE=engines/tiny-cpu MODEL=checkpoints/tiny
	@$(BIN)/python -m scripts.demo engines/tiny-cpu

build-engine: $(ENGINE)/manifest.json ## Quantise MODEL (folder or hub id) and build ENGINE for TARGET
	@$(BIN)/trimode info $(ENGINE)

serve: $(VENV)/.package $(SERVED) ## Answer OpenAI's API over ENGINE on port 8000, with the playground at /
	@$(BIN)/trimode serve $(ENGINE)

triton: $(TRITON)/.package $(SERVED) ## Serve ENGINE by a real tritonserver on the CPU, ports 8000 to 8002
	@$(TRITON)/bin/python -m scripts.serving.triton_server $(ENGINE)

triton-environment: $(TRITON)/.package ## Make .triton, in which `make triton` and its tests run the server

browser: ## Install Debian's Chromium, for the playground's test (as root)
	@command -v chromium chromedriver >/dev/null || \
		(apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium chromium-driver >/dev/null)

test: lint types docs ## Set-up, lint, types, the documentation site and all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.package ## Ruff, import rules, Dockerfile, compose file, GitHub's files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

types: $(VENV)/.package ## mypy on the package
	$(BIN)/mypy -p trimode

docs: $(VENV)/.package ## Build the documentation site into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.package ## Build the sdist and the wheel into dist/
	@rm -rf dist
	@$(BIN)/pyproject-build --outdir dist . >/dev/null
	@ls dist

wheel-test: wheel ## Install the wheel alone in a fresh environment and answer a prompt there
	@$(BIN)/python -m scripts.check_wheel dist

prove: $(VENV)/.package ## Measure the table of docs/results.md: engines against the PyTorch reference (about 2 to 5 minutes)
	@$(BIN)/python -m scripts.prove.engines

prove-runtime: $(VENV)/.package ## Measure the second table of docs/results.md: many requests at once (about 5 minutes)
	@$(MAKE) --no-print-directory engines/tiny-cpu/manifest.json ENGINE=engines/tiny-cpu MODEL=checkpoints/tiny
	@$(BIN)/python -m scripts.prove.runtime engines/tiny-cpu --checkpoint engines/tiny-w4a16-awq64

bench: $(VENV)/.package ## Tokens a second by mode and load against the PyTorch reference, with the curves (about 2 to 8 minutes)
	@$(MAKE) --no-print-directory engines/tiny-cpu/manifest.json ENGINE=engines/tiny-cpu MODEL=checkpoints/tiny
	@$(BIN)/python -m scripts.bench.modes engines/tiny-cpu --checkpoint engines/tiny-w4a16-awq64 --plot engines/bench.png

audit: $(VENV)/.package ## Build the 8B shape with random weights for TensorRT-RTX and audit it (20 GB of disk, 23 GiB of memory)
	@test -e $(AUDITED)/config.json || $(BIN)/python -m scripts.gpu.random_w4a16_checkpoint $(SHAPE) $(AUDITED)
	@test -e $(AUDITED)-rtx/manifest.json || $(BIN)/trimode build $(AUDITED) $(AUDITED)-rtx --target rtx --sm 121,120,89 --capacity 32768
	@$(BIN)/trimode audit $(AUDITED)-rtx --window 512,4096,32768 --plot $(AUDITED)-rtx.png

kernels: $(VENV)/.package ## The GPU kernels in numbers: traffic, an estimated cycle, registers (compiles for seven GPUs: 10 minutes)
	@$(BIN)/python -m scripts.gpu.kernel_table traffic
	@$(BIN)/python -m scripts.gpu.cycle_estimate
	@$(BIN)/python -m scripts.gpu.kernel_table resources

train-tiny: $(VENV)/.package ## Train the shipped checkpoint again from its seed (about an hour)
	$(BIN)/python -m scripts.tiny.train --out engines/tiny-trained

clean: ## Remove .venv, .triton, engines and caches
	rm -rf $(VENV) $(TRITON) engines site dist .setuptools .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Installed in place: tools and commands see every change of the working tree.
$(VENV)/.package: pyproject.toml trimode/__init__.py common/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[build,rtx,tensorrt,serve,dev,docs]'
	@touch $@

# numpy 1, which the Python backend's stub needs, and no torch.
$(TRITON)/.package: pyproject.toml trimode/__init__.py common/version.py
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --upgrade pip
	$(TRITON)/bin/python -m pip install --quiet --editable '.[triton]'
	@touch $@

# Beside an engine and a quantised folder: what they were asked to be. Asked for otherwise, they are made anew; a folder
# that make knows nothing of is left alone.
$(ENGINE).asked: ASKED = $(MODEL) $(METHOD) $(GROUP) $(CALIBRATION) $(TARGET)
$(QUANTIZED).asked: ASKED = $(MODEL) $(METHOD) $(GROUP) $(CALIBRATION)
$(ENGINE).asked $(QUANTIZED).asked: FORCE
	@test -e $@ || test ! -e $(basename $@) || \
		{ echo "make does not know what $(basename $@) was made of: remove it, or name another folder" >&2; exit 1; }
	@mkdir -p $(@D)
	@echo "$(ASKED)" | cmp --silent - $@ || echo "$(ASKED)" >$@

# An engine outlives changes of the code; remove its folder to build it anew.
$(ENGINE)/manifest.json: $(ENGINE).asked $(if $(IS_INT4),$(MODEL_FILES),$(QUANTIZED)/config.json) | $(VENV)/.package
	@echo "Building $(ENGINE) for $(TARGET)"
	@$(BIN)/trimode build $(if $(IS_INT4),$(MODEL),$(QUANTIZED)) $(ENGINE).new --target $(TARGET) >/dev/null
	@rm -rf $(ENGINE)
	@mv $(ENGINE).new $(ENGINE)

$(QUANTIZED)/config.json: $(QUANTIZED).asked $(MODEL_FILES) $(CALIBRATION) | $(VENV)/.package
	@echo "Quantising $(MODEL) by $(METHOD) in groups of $(GROUP), into $(QUANTIZED)"
	@$(BIN)/trimode quantize $(MODEL) $(QUANTIZED).new --method $(METHOD) --group $(GROUP) \
		$(if $(CALIBRATION),--calibration $(CALIBRATION)) >/dev/null
	@rm -rf $(QUANTIZED)
	@mv $(QUANTIZED).new $(QUANTIZED)

# An engine needs it no more.
.SECONDARY: $(QUANTIZED)/config.json

.PHONY: FORCE help setup demo audit kernels build-engine serve triton triton-environment browser test lint types docs wheel wheel-test prove prove-runtime bench train-tiny clean
