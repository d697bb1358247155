"""The plugins declared through TensorRT's own bindings, and the compiled kernels of a small network."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.plugin_builder import write_small_library


@pytest.fixture(scope="session")
def declarations(tensorrt: ModuleType) -> ModuleType:
    del tensorrt  # must be importable first
    return importlib.import_module("trimode.plugins.declarations")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of a small network for compute capability 9.0, in fp16."""
    return write_small_library(tmp_path_factory.mktemp("kernels"))
