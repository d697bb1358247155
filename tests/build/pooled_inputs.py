"""Weights of the pool, given to ONNX Runtime as inputs of a graph."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto

TYPES = {
    "tensor(float)": TensorProto.FLOAT,
    "tensor(float16)": TensorProto.FLOAT16,
    "tensor(bfloat16)": TensorProto.BFLOAT16,
    "tensor(int8)": TensorProto.INT8,
}


def bind_pooled(binding: ort.IOBinding, value: ort.NodeArg, data: NDArray[np.uint8]) -> None:
    """Bind the bytes where they lie; numpy need not know their type. ``data`` must outlive the binding."""
    binding.bind_input(value.name, "cpu", 0, TYPES[value.type], value.shape, data.ctypes.data)
