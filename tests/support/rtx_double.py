"""A test double of TensorRT-RTX, on the double of the CUDA driver.

It replaces the name ``trt`` of modules of target rtx. An engine executes its ``graph.onnx`` in ONNX Runtime, with every
input and output bound at the address that was set. ONNX Runtime reads the weights from a file of the test. The double
refuses to run unless the same bytes are mapped as the plan's weights. It raises an error for faults that a GPU would
not report: an output that does not alias its input, a context that is changed after its capture.

The double does not show that the plans compute the same as the graphs, or that the real calls accept the arguments
(only their names and parameters are compared with the real bindings), and it gives no timing.
"""

# ruff: noqa: N802 - TensorRT's names

from __future__ import annotations

import ctypes
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from tests.support.driver_double import GRANULARITY, DriverDouble, FaultError, map_memory, unknown_driver_calls
from trimode.engine.files import POOL
from trimode.engine.manifest import Manifest
from trimode.engine.plan_file import MOST_ASKED, MOST_MASKED_ROWS, whole_plan
from trimode.engine.targets.rtx import PLAN, RtxSection


@dataclass
class PlanDouble:
    """The graph that a plan was compiled from, the plan's bytes, and the weights among them."""

    graph: Path
    content: bytes
    section: np.ndarray
    activations: int = 4096


def plan_doubles(engine: Path, graphs: Path) -> list[PlanDouble]:
    """Doubles for a real engine directory. graphs: a folder with ar.onnx, diffusion.onnx and their weights."""
    section = Manifest.read(engine).section(RtxSection)
    doubles = []
    for name, entry in (("ar", section.ar), ("diffusion", section.diffusion)):
        content = b"".join(whole_plan(engine / name / PLAN, engine / POOL, entry))
        begin = entry.splices[0].plan_offset
        end = entry.splices[-1].plan_offset + sum(splice.bytes for splice in entry.splices)
        weights = np.frombuffer(content[begin:end], np.uint8)
        section = np.zeros(-(-len(weights) // GRANULARITY) * GRANULARITY, np.uint8)
        section[: len(weights)] = weights
        doubles.append(PlanDouble(graphs / f"{name}.onnx", content, section))
    return doubles


class TrtDouble:
    """The part of ``tensorrt_rtx`` that the runtime uses, for these plans and one GPU."""

    def __init__(self, real: Any, cuda: DriverDouble, plans: list[PlanDouble], manages_weights: bool = True) -> None:
        self._real = real
        self._cuda = cuda
        self.plans = plans
        self.manages_weights = manages_weights
        self.engines: list[EngineDouble] = []
        self.invalidity = 0  # what get_engine_validity is to find

    def __getattr__(self, name: str) -> Any:
        """Enumerations, the version and the base class of loggers are the real ones."""
        return getattr(self._real, name)

    def Runtime(self, logger: Any) -> RuntimeDouble:
        return RuntimeDouble(self, logger)


class RuntimeDouble:
    engine_header_size = 64

    def __init__(self, trt: TrtDouble, logger: Any) -> None:
        self._trt = trt
        self._logger = logger

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        assert len(buffer) == self.engine_header_size
        if self._trt.invalidity:
            return self._trt.EngineValidity.INVALID, self._trt.invalidity
        return self._trt.EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, serialized_engine: Any) -> EngineDouble | None:
        for plan in self._trt.plans:
            if plan.content == bytes(serialized_engine):
                self._trt.engines.append(EngineDouble(self._trt, plan))
                return self._trt.engines[-1]
        self._logger.log(self._trt.ILogger.Severity.ERROR, "Serialization assertion failed")
        return None


class EngineDouble:
    def __init__(self, trt: TrtDouble, plan: PlanDouble) -> None:
        self.trt = trt
        self.cuda = trt._cuda
        self.plan = plan
        model = onnx.load(plan.graph, load_external_data=False)
        self.aliases = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "TensorScatter"}
        self.session = ort.InferenceSession(str(plan.graph), _session_options(), providers=["CPUExecutionProvider"])
        self.names = [value.name for value in (*self.session.get_inputs(), *self.session.get_outputs())]
        self.device_memory_size_v2 = plan.activations
        # Location of the weights on the device: the engine's own copy, ranges of other memory, or none.
        self.own_copy = True
        self.pieces: dict[int, int] = {}
        self.weights_at = map_memory(None, plan.section.nbytes, None)

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_weights_manager(self) -> WeightsManagerDouble | None:
        return WeightsManagerDouble(self) if self.trt.manages_weights else None

    def create_runtime_config(self) -> RuntimeConfigDouble:
        return RuntimeConfigDouble(self.trt)

    def create_execution_context(self, runtime_config: RuntimeConfigDouble) -> ContextDouble:
        if not self.weights_are_whole():
            raise FaultError("a context of an engine without its weights")
        return ContextDouble(self, runtime_config)

    def weights_are_whole(self) -> bool:
        """Whether every byte is mapped and equals the plan's."""
        if self.own_copy:
            return True
        size = self.plan.section.nbytes
        if sum(self.pieces.values()) != size:
            return False
        return np.array_equal(_at(self.weights_at, np.dtype(np.uint8), (size,)), self.plan.section)


class WeightsManagerDouble:
    def __init__(self, engine: EngineDouble) -> None:
        self._engine = engine
        self._cuda = engine.cuda

    def get_size(self) -> int:
        return self._engine.plan.section.nbytes

    def save_to_buffer(self, destination: int, size: int, location: Any, stream_handle: int) -> bool:
        assert location == self._engine.trt.TensorLocation.HOST
        section = self._engine.plan.section
        if size != section.nbytes or not self._engine.own_copy:
            return False
        self._cuda._submit(stream_handle, lambda: ctypes.memmove(destination, section.ctypes.data, size))
        return True

    def unload(self, stream_handle: int) -> bool:
        self._cuda._known(stream_handle)
        self._engine.own_copy = False
        return True

    def restore_from_vmm_allocation(self, allocation_handle: int, offset: int, size: int, stream_handle: int) -> bool:
        self._cuda._known(stream_handle)
        file, available = self._cuda.files[allocation_handle]
        overlaps = any(offset < at + length and at < offset + size for at, length in self._engine.pieces.items())
        if self._engine.own_copy or overlaps or offset % GRANULARITY or size % GRANULARITY or size > available:
            return False
        map_memory(self._engine.weights_at + offset, size, file)
        self._engine.pieces[offset] = size
        return True


class RuntimeConfigDouble:
    """Records the settings. A context is created only if all of them were set."""

    def __init__(self, trt: TrtDouble) -> None:
        self._trt = trt
        self.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
        self._allocation: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._allocation = strategy

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> bool:
        return cache is not None

    def is_for_capture(self) -> bool:
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        user_managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self.dynamic_shapes_kernel_specialization_strategy == eager and self._allocation == user_managed


@dataclass
class ContextDouble:
    engine: EngineDouble
    config: RuntimeConfigDouble
    memory: tuple[int, int] | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    captured: bool = False

    def __post_init__(self) -> None:
        assert self.config.is_for_capture()
        self._inputs = {value.name: value for value in self.engine.session.get_inputs()}
        self._outputs = {value.name: value for value in self.engine.session.get_outputs()}

    def set_device_memory(self, memory: int, size: int) -> None:
        self._change()
        self.memory = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._change()
        declared = self._inputs[name].shape
        if name.startswith("k_view."):
            # A plan declares keys as columns, and the graph as rows; in memory both are the same.
            columns, head_dim, rows, one = shape
            assert one == 1
            shape = (columns // declared[1], declared[1], rows, head_dim)
        fits = len(declared) == len(shape) and all(
            isinstance(one, str) or one == other for one, other in zip(declared, shape, strict=True)
        )
        self.shapes[name] = tuple(shape)
        axis, most = _LIMITS.get(name, (0, shape[0]))
        if shape[axis] > most:
            raise FaultError(f"{name}: {shape[axis]} exceeds the profile's {most}")
        return fits

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._change()
        self.addresses[name] = memory
        return name in self._inputs or name in self._outputs

    def infer_shapes(self) -> list[str]:
        return [name for name in self._inputs if name not in self.shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self.engine.cuda
        if self.memory is None or self.memory[1] < self.engine.device_memory_size_v2:
            raise FaultError("no memory for activations")
        cuda.on_device(*self.memory)
        run = self._bound_run()
        self.captured |= cuda.capturing is not None
        cuda._submit(stream_handle, run)
        return True

    def _change(self) -> None:
        if self.captured:
            raise FaultError("a context was changed after it was captured")

    def _bound_run(self) -> Callable[[], None]:
        """The pass with the current bindings. Later changes of the context do not affect it."""
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            for dimension, size in zip(self._inputs[name].shape, shape, strict=True):
                if isinstance(dimension, str) and sizes.setdefault(dimension, size) != size:
                    raise FaultError(f"{name}: {dimension} is {size} here and {sizes[dimension]} elsewhere")
        places = []
        for name, value in (self._inputs | self._outputs).items():
            dtype = _DTYPES[value.type]
            shape = tuple(sizes[one] if isinstance(one, str) else one for one in value.shape)
            address = self.addresses[name]
            self.engine.cuda.on_device(address, int(np.prod(shape)) * dtype.itemsize)
            if name in self.engine.aliases and address != self.addresses[self.engine.aliases[name]]:
                raise FaultError(f"{name} is not bound where {self.engine.aliases[name]} is")
            if "_view." in name and address != self.addresses[name.replace("_view.", "_cache.")]:
                raise FaultError(f"{name} is not bound where its cache is")
            places.append((name, dtype, shape, address))
        binding = self.engine.session.io_binding()
        for name, dtype, shape, address in places:
            bind = binding.bind_input if name in self._inputs else binding.bind_output
            bind(name, "cpu", 0, dtype, shape, address)
        write, window_rows, window = (
            self.addresses["write_indices"],
            self.addresses.get("window_rows"),
            sizes.get("window"),
        )
        mask, batch = self.addresses.get("block_mask"), sizes["batch"]
        step, capacity = sizes["step"], places[[name for name, *_ in places].index("k_cache.0")][2][2]

        def run() -> None:
            reach = int(_at(write, np.dtype(np.int64), (batch,)).max()) + step
            if reach > capacity:
                raise FaultError(f"a pass wrote up to row {reach} of slots of {capacity}")
            if window_rows and not np.array_equal(_at(window_rows, np.dtype(np.int64), (window,)), np.arange(window)):
                raise FaultError("window_rows are not 0, 1, ...")
            if mask is not None and not _at(mask, np.dtype(np.bool_), (batch, step, step)).any(axis=2).all():
                raise FaultError("a token sees nothing of its step: NaN in the pool")
            if not self.engine.weights_are_whole():
                raise FaultError("the weights are not the plan's")
            self.engine.session.run_with_iobinding(binding)

        return run


# Axes that the plans' profiles limit to less than a pass may have.
_LIMITS = {"token_mask": (1, MOST_MASKED_ROWS), "asked_ids": (2, MOST_ASKED)}
_DTYPES = {
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


def _at(address: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Without this setting, int4 products round their inputs to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def misremembered_calls(real_trt: Any) -> list[str]:
    """Calls of the double that do not exist in the real bindings, or that have other parameters there."""
    found = unknown_driver_calls()
    for double, kind in {
        RuntimeDouble: real_trt.Runtime,
        EngineDouble: real_trt.ICudaEngine,
        WeightsManagerDouble: real_trt.IWeightsManager,
        RuntimeConfigDouble: real_trt.IRuntimeConfig,
        ContextDouble: real_trt.IExecutionContext,
    }.items():
        for name, call in vars(double).items():
            if callable(call) and not name.startswith("_") and name not in _OWN_CALLS:
                documented = [_documented(line) for line in (getattr(kind, name).__doc__ or "").splitlines()]
                if list(inspect.signature(call).parameters)[1:] not in documented:
                    found.append(f"{kind.__name__}.{name}")
    return found


_OWN_CALLS = {"weights_are_whole", "is_for_capture"}


def _documented(line: str) -> list[str] | None:
    """Argument names of a signature such as ``2. name(self: A, one: B, two: C = <D>) -> E``."""
    match = re.match(r"(?:\d+\. )?\w+\(self: [^,)]+(?:, )?(.*)\) -> ", line)
    return None if match is None else re.findall(r"(\w+): ", re.sub(r"<[^>]*>", "", match[1]))
