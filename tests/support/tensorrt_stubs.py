"""TensorRT's Python bindings, including the validator of plugin declarations, without TensorRT.

The bindings import nine functions from three libraries. The C compiler builds stub libraries with these functions.
Numbers replace symbolic shapes, so that the bindings' plugin classes can be called like TensorRT calls them.
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.plugin_builder import DimsExprs, Number, PassedSymbol, Registry

STUBS = {
    "libnvinfer.so.11": (
        *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
        *("getBuilderPluginRegistry", "getPluginRegistry"),
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
    "libnvonnxparser.so.11": (
        *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    ),
}


def bindings_on_stubs(folder: Path) -> Iterator[ModuleType]:
    """The bindings under their usual module name; removed when the generator resumes."""
    kept: list[Any] = []
    for library, functions in STUBS.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library), str(source)]
        subprocess.run(command, check=True)
        kept.append(ctypes.CDLL(str(folder / library)))  # so that the bindings find it by its soname
    bindings = importlib.import_module("tensorrt_bindings")
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "tensorrt", bindings)
    patch.setattr(bindings, "IDimensionExpr", Number)
    patch.setattr(bindings, "DimsExprs", DimsExprs)
    patch.setattr(bindings, "get_plugin_registry", Registry().itself)
    # The class that passes a symbol to TensorRT; here the symbol stays in Python.
    patch.setattr(importlib.import_module("tensorrt.plugin._tensor"), "SymExprImpl", PassedSymbol)
    yield bindings
    patch.undo()
