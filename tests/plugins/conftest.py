"""Plugins as TensorRT's own bindings see them, and a small network's kernels."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.plugin_builder import write_small_library


@pytest.fixture(scope="session")
def declarations(tensorrt: ModuleType) -> ModuleType:
    del tensorrt  # must be there before the import
    return importlib.import_module("trimode.plugins.declarations")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels for compute capability 9.0 of a small network, in fp16."""
    return write_small_library(tmp_path_factory.mktemp("kernels"))
