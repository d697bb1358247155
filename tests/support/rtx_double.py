"""A test double of TensorRT-RTX, on the double of the CUDA driver.

It replaces the name ``trt`` of modules of target rtx; :mod:`tests.support.plan_double` describes how passes run. ONNX
Runtime reads the weights from a file of the test. The double refuses to run unless the same bytes are mapped as the
plan's weights.

The double does not show that the plans compute the same as the graphs, or that the real calls accept the arguments
(only their names and parameters are compared with the real bindings), and it gives no timing.
"""

# ruff: noqa: N802 - TensorRT's names

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.driver_double import GRANULARITY, DriverDouble, FaultError, map_memory
from tests.support.plan_double import PlanContextDouble, PlanEngineDouble, array_at, misremembered
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


class EngineDouble(PlanEngineDouble):
    def __init__(self, trt: TrtDouble, plan: PlanDouble) -> None:
        super().__init__(trt._cuda, plan.graph, plan.activations)
        self.trt = trt
        self.plan = plan
        # Location of the weights on the device: the engine's own copy, ranges of other memory, or none.
        self.own_copy = True
        self.pieces: dict[int, int] = {}
        self.weights_at = map_memory(None, plan.section.nbytes, None)

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
        return np.array_equal(array_at(self.weights_at, np.dtype(np.uint8), (size,)), self.plan.section)

    def _check_before_a_run(self) -> None:
        if not self.weights_are_whole():
            raise FaultError("the weights are not the plan's")


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


class ContextDouble(PlanContextDouble):
    def __init__(self, engine: EngineDouble, config: RuntimeConfigDouble) -> None:
        assert config.is_for_capture()
        super().__init__(engine)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        axis, most = _LIMITS.get(name, (0, shape[0]))
        if shape[axis] > most:
            raise FaultError(f"{name}: {shape[axis]} exceeds the profile's {most}")

    def _in_graph(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A plan declares keys as columns, and the graph as rows; in memory both are the same."""
        if not name.startswith("k_view."):
            return tuple(shape)
        columns, head_dim, rows, one = shape
        assert one == 1
        heads = self.engine.inputs[name].shape[1]
        return columns // heads, heads, rows, head_dim


# Axes that the plans' profiles limit to less than a pass may have.
_LIMITS = {"token_mask": (1, MOST_MASKED_ROWS), "asked_ids": (2, MOST_ASKED)}


def misremembered_calls(real_trt: Any) -> list[str]:
    """Calls of the double that do not exist in the real bindings, or that have other parameters there."""
    kinds = {
        RuntimeDouble: real_trt.Runtime,
        EngineDouble: real_trt.ICudaEngine,
        WeightsManagerDouble: real_trt.IWeightsManager,
        RuntimeConfigDouble: real_trt.IRuntimeConfig,
        ContextDouble: real_trt.IExecutionContext,
    }
    return misremembered(kinds, ("weights_are_whole", "is_for_capture"))
