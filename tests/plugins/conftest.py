"""The options for kernels on a GPU; the plugins declared through TensorRT's own bindings; compiled kernels.

A machine with a GPU may lack the packages of the other tests. There, ``--confcutdir=tests/plugins`` leaves out the
fixtures of all tests, and ``--gpu`` the tests that launch no kernel.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.kernel_functions import Executed

KERNEL_TESTS = {
    *(
        "test_attention.py",
        "test_graph_operators.py",
        "test_head_product.py",
        "test_int4_product.py",
        "test_kv_write.py",
    ),
    "test_qkv_product.py",
}
_EXECUTOR = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption("--gpu", action="store_true", help="execute the kernel tests' kernels on a GPU")
    group.addoption("--kernels", type=Path, default=Path(".gpu/tests"), help="kernels compiled for --gpu")
    group.addoption("--list-kernels", type=Path, help="write the kernels that the kernel tests launch to this file")
    group.addoption("--sm", type=int, help="of --list-kernels: list those that fit this GPU, 90 for 9.0")


def _option(config: pytest.Config, name: str) -> Any:
    """The option's value. A run of all tests reads this file too late to take options, and has none."""
    return config.getoption(name, None)


def pytest_configure(config: pytest.Config) -> None:
    if _option(config, "gpu"):
        from tests.support.gpu_kernels import GpuKernels, draw_the_same_cases_everywhere
        from trimode.common.gpus import find_gpus

        if not (gpus := find_gpus()).found:
            raise pytest.UsageError(f"--gpu needs an NVIDIA GPU; the CUDA driver here: {gpus.driver}")
        folder = _option(config, "kernels")
        if not folder.is_dir():
            raise pytest.UsageError(f"{folder} is missing; run `python -m scripts.gpu.check emit` on any machine")
        draw_the_same_cases_everywhere()
        config.stash[_EXECUTOR] = Executed.by = GpuKernels(folder)
    elif _option(config, "list_kernels"):
        from tests.support.gpu_kernels import ListedKernels, draw_the_same_cases_everywhere

        draw_the_same_cases_everywhere()
        config.stash[_EXECUTOR] = Executed.by = ListedKernels(_option(config, "sm"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    only_kernels = _option(config, "gpu") or _option(config, "list_kernels")
    return True if only_kernels and collection_path.is_file() and collection_path.name not in KERNEL_TESTS else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _option(config, "gpu"):
        terminalreporter.write_line(config.stash[_EXECUTOR].summary)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if file := _option(session.config, "list_kernels"):
        session.config.stash[_EXECUTOR].write(file)


@pytest.fixture(scope="session")
def declarations(tensorrt: ModuleType) -> ModuleType:
    del tensorrt  # must be importable first
    return importlib.import_module("trimode.plugins.declarations")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of a small network for compute capability 9.0, in fp16."""
    from tests.support.plugin_builder import write_small_library

    return write_small_library(tmp_path_factory.mktemp("kernels"))
