# Two commands do everything, set-up included: `make demo` and `make test`.

PYTHON ?= python3
MODEL ?= checkpoints/tiny
TARGET ?= cpu
METHOD ?= awq
GROUP ?= 128
CALIBRATION ?=
NAME = $(notdir $(patsubst %/,%,$(MODEL)))
SHAPE ?= 8b
AUDITED ?= engines/random-$(SHAPE)
ENGINE ?= engines/$(NAME)-$(TARGET)
QUANTIZED ?= engines/$(NAME)-w4a16-$(METHOD)$(GROUP)

VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find model quantize plugins build runtime -name '*.py')
PACKAGES := model quantize plugins build runtime

.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.package ## Make .venv and install trimode with everything the other targets need

demo: $(VENV)/.package ## Quantise the shipped checkpoint, build its engines, answer prompts in every mode
	@$(MAKE) --no-print-directory engines/tiny-cpu/manifest.json ENGINE=engines/tiny-cpu MODEL=checkpoints/tiny GROUP=64
	@$(BIN)/python scripts/demo.py engines/tiny-cpu

build-engine: $(ENGINE)/manifest.json ## Quantise MODEL (folder or hub id) and build ENGINE for TARGET
	@$(BIN)/trimode info $(ENGINE)

test: lint types ## Set-up, lint, types and all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.package ## ruff and the floors' import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.package ## mypy on the installed package
	$(BIN)/mypy $(addprefix -p trimode.,$(PACKAGES))

prove: $(VENV)/.package ## Measure the README's table: engines against the PyTorch reference (about 4 minutes)
	@$(BIN)/python scripts/prove.py

audit: $(VENV)/.package ## Build the 8B shape with random weights for TensorRT-RTX and audit it (20 GB of disk, 23 GiB of memory)
	@test -e $(AUDITED)/config.json || $(BIN)/python scripts/random_w4a16_checkpoint.py $(SHAPE) $(AUDITED)
	@test -e $(AUDITED)-rtx/manifest.json || $(BIN)/trimode build $(AUDITED) $(AUDITED)-rtx --target rtx --sm 121,120,89 --capacity 32768
	@$(BIN)/trimode audit $(AUDITED)-rtx --window 512,4096,32768 --plot $(AUDITED)-rtx.png

kernels: $(VENV)/.package ## The GPU kernels in numbers: traffic, an estimated cycle, registers (compiles for seven GPUs: 10 minutes)
	@$(BIN)/python -m scripts.kernel_table traffic
	@$(BIN)/python -m scripts.cycle_estimate
	@$(BIN)/python -m scripts.kernel_table resources

train-tiny: $(VENV)/.package ## Train the shipped checkpoint again from its seed (about an hour)
	$(BIN)/python scripts/tiny/train.py --out engines/tiny-trained

clean: ## Remove .venv, engines and caches
	rm -rf $(VENV) engines .setuptools .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.dependencies: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '.[build,rtx,tensorrt,dev]'
	@touch $@

$(VENV)/.package: $(VENV)/.dependencies $(SOURCES)
	rm -rf .setuptools
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall .
	@touch $@

# An engine outlives changes of the code; remove its folder to build it anew.
$(ENGINE)/manifest.json: | $(VENV)/.package
	@test -e $(MODEL)/hf_quant_config.json || test -e $(QUANTIZED)/config.json || \
		$(BIN)/trimode quantize $(MODEL) $(QUANTIZED) --method $(METHOD) --group $(GROUP) $(if $(CALIBRATION),--calibration $(CALIBRATION))
	@$(BIN)/trimode build $(if $(wildcard $(MODEL)/hf_quant_config.json),$(MODEL),$(QUANTIZED)) $(ENGINE) --target $(TARGET)

.PHONY: help setup demo audit kernels build-engine test lint types prove train-tiny clean
