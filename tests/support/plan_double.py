"""What the doubles of TensorRT and of TensorRT-RTX share: engines and contexts over the double of the CUDA driver.

An engine executes its ONNX graph in ONNX Runtime, with every input and output bound at the address that was set. The
doubles raise an error for faults that a GPU would not report: an output that does not alias its input, a context that
is changed after it ran or was captured, a capture before the first run.
"""

from __future__ import annotations

import ctypes
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from tests.support.driver_double import DriverDouble, FaultError, unknown_driver_calls
from tests.support.graph_executor import open_session
from trimode.plugins.operators import DOMAIN, OPERATORS

BFLOAT16 = onnx.TensorProto.BFLOAT16
_DTYPES = {
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
}


class PlanEngineDouble:
    """activations: bytes that a context needs."""

    def __init__(self, cuda: DriverDouble, graph: Path, activations: int) -> None:
        self.cuda = cuda
        self.aliases = aliases_of(onnx.load(graph, load_external_data=False).graph)
        self.session = open_session(graph)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.device_memory_size_v2 = activations

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def _check_before_a_run(self) -> None:
        """Raise FaultError if the engine cannot run."""


def aliases_of(graph: onnx.GraphProto) -> dict[str, str]:
    """The graph's outputs that must be bound where an input is, with the input's name."""
    written: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "TensorScatter":
            written[node.output[0]] = node.input[0]
        elif node.domain == DOMAIN:
            operator = OPERATORS[node.op_type]
            given = dict(zip((operand.name for operand in operator.inputs), node.input, strict=True))
            for name, operand in zip(node.output, operator.outputs, strict=True):
                if operand.aliases is not None:
                    written[name] = given[operand.aliases]
    aliases = {}
    for name in (value.name for value in graph.output):
        origin = name
        while origin in written:
            origin = written[origin]
        if origin != name:
            aliases[name] = origin
    return aliases


class PlanContextDouble:
    def __init__(self, engine: PlanEngineDouble) -> None:
        self.engine = engine
        self.memory: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.ran = False

    def set_device_memory(self, memory: int, size: int) -> None:
        self._change()
        self.memory = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._change()
        self._check_shape(name, shape)
        declared, shape = self.engine.inputs[name].shape, self._in_graph(name, shape)
        self.shapes[name] = shape
        return len(declared) == len(shape) and all(
            isinstance(one, str) or one == other for one, other in zip(declared, shape, strict=True)
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._change()
        self.addresses[name] = memory
        return name in self.engine.names

    def infer_shapes(self) -> list[str]:
        return [
            name
            for name, value in self.engine.inputs.items()
            if name not in self.shapes and any(isinstance(dim, str) for dim in value.shape)
        ]

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self.engine.cuda
        if self.memory is None or self.memory[1] < self.engine.device_memory_size_v2:
            raise FaultError("no memory for activations")
        cuda.on_device(*self.memory)
        run = self._bound_run()
        if cuda.capturing is not None and not self.ran:
            raise FaultError("a context was captured before it ran")
        self.ran = True
        cuda._submit(stream_handle, run)
        return True

    def _change(self) -> None:
        if self.ran:
            raise FaultError("a context was changed after it ran")

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise FaultError if the plan does not take an input of this shape."""

    def _in_graph(self, _name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the graph's input if the plan's is ``shape``."""
        return tuple(shape)

    def _bound_run(self) -> Callable[[], None]:
        """The pass with the current bindings. Later changes of the context do not affect it."""
        engine = self.engine
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            for dimension, size in zip(engine.inputs[name].shape, shape, strict=True):
                if isinstance(dimension, str) and sizes.setdefault(dimension, size) != size:
                    raise FaultError(f"{name}: {dimension} is {size} here and {sizes[dimension]} elsewhere")
        places = {}
        for name, value in (engine.inputs | engine.outputs).items():
            dtype = _DTYPES[value.type]
            shape = tuple(sizes[one] if isinstance(one, str) else one for one in value.shape)
            address = self.addresses[name]
            engine.cuda.on_device(address, int(np.prod(shape)) * dtype.itemsize)
            if name in engine.aliases and address != self.addresses[engine.aliases[name]]:
                raise FaultError(f"{name} is not bound where {engine.aliases[name]} is")
            if "_view." in name and address != self.addresses[name.replace("_view.", "_cache.")]:
                raise FaultError(f"{name} is not bound where its cache is")
            places[name] = (dtype, shape, address)
        binding = engine.session.io_binding()
        for name, (dtype, shape, address) in places.items():
            bind = binding.bind_input if name in engine.inputs else binding.bind_output
            element = BFLOAT16 if dtype == ml_dtypes.bfloat16 else dtype  # which numpy lacks
            bind(name, "cpu", 0, element, shape, address)
        write, mask = self.addresses["write_indices"], self.addresses.get("block_mask")
        window_rows, window = self.addresses.get("window_rows"), sizes.get("window")
        batch, step, capacity = sizes["batch"], sizes["step"], places["k_cache.0"][1][2]

        def run() -> None:
            reach = int(array_at(write, np.dtype(np.int64), (batch,)).max()) + step
            if reach > capacity:
                raise FaultError(f"a pass wrote up to row {reach} of slots of {capacity}")
            rows = np.arange(window or 0)
            if window_rows and not np.array_equal(array_at(window_rows, np.dtype(np.int64), rows.shape), rows):
                raise FaultError("window_rows are not 0, 1, ...")
            if mask is not None and not array_at(mask, np.dtype(np.bool_), (batch, step, step)).any(axis=2).all():
                raise FaultError("a token sees nothing of its step: NaN in the pool")
            engine._check_before_a_run()
            engine.session.run_with_iobinding(binding)

        return run


def array_at(address: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def misremembered(doubles: Mapping[type, Any], own_calls: tuple[str, ...] = ()) -> list[str]:
    """Calls of doubles that the classes of the real bindings lack, or that have other parameters there. own_calls: of
    the doubles, not of the library.
    """
    found = unknown_driver_calls()
    for double, kind in doubles.items():
        for name, call in inspect.getmembers(double, callable):
            if not name.startswith("_") and name not in own_calls:
                documented = [_documented(line) for line in (getattr(kind, name).__doc__ or "").splitlines()]
                if list(inspect.signature(call).parameters)[1:] not in documented:
                    found.append(f"{kind.__name__}.{name}")
    return found


def _documented(line: str) -> list[str] | None:
    """Argument names of a signature such as ``2. name(self: A, one: B, two: C = <D>) -> E``."""
    match = re.match(r"(?:\d+\. )?\w+\(self: [^,)]+(?:, )?(.*)\) -> ", line)
    return None if match is None else re.findall(r"(\w+): ", re.sub(r"<[^>]*>", "", match[1]))
