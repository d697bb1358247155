"""A test double of TensorRT's runtime, on the double of the CUDA driver.

It loads the plans of :class:`tests.support.tensorrt_double.TensorrtDouble`: an engine has the profiles that the build
gave it, and executes the graph that was compiled. :mod:`tests.support.plan_double` describes how passes run. Weights
are inputs, so ONNX Runtime reads them where the executor binds them.

The double does not show that TensorRT's plans compute the same as the graphs, or that the real calls accept the
arguments (only their names and parameters are compared with the real bindings), and it gives no timing.
"""

# ruff: noqa: N802 - TensorRT's names

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.driver_double import DriverDouble, FaultError
from tests.support.plan_double import PlanContextDouble, PlanEngineDouble, misremembered

Profile = dict[str, list[list[int]]]


class TrtRuntimeDouble:
    """The part of ``tensorrt`` that the runtime uses. graphs: what engines execute, by the hash of the graph that was
    compiled.
    """

    def __init__(self, real: Any, cuda: DriverDouble, graphs: Mapping[str, Path]) -> None:
        self._real = real
        self.cuda = cuda
        self.graphs = graphs
        self.contexts: list[ContextDouble] = []

    def __getattr__(self, name: str) -> Any:
        """Enumerations, the version and the base class of loggers are the real ones."""
        return getattr(self._real, name)

    def Runtime(self, logger: Any) -> RuntimeDouble:
        return RuntimeDouble(self, logger)


class RuntimeDouble:
    def __init__(self, trt: TrtRuntimeDouble, logger: Any) -> None:
        self._trt = trt
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> EngineDouble | None:
        try:
            plan = json.loads(serialized_engine)
            return EngineDouble(self._trt, self._trt.graphs[plan["graph"]], plan["profiles"])
        except (ValueError, KeyError):
            self._logger.log(self._trt.ILogger.Severity.ERROR, "Serialization assertion failed")
            return None


class EngineDouble(PlanEngineDouble):
    def __init__(self, trt: TrtRuntimeDouble, graph: Path, profiles: list[Profile]) -> None:
        super().__init__(trt.cuda, graph, activations=4096)
        self.trt = trt
        self._profiles = profiles

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return self._profiles[profile_index][name]

    def get_tensor_shape(self, name: str) -> list[int]:
        shape = (self.inputs | self.outputs)[name].shape
        return [-1 if isinstance(dim, str) else dim for dim in shape]

    def create_execution_context(self, strategy: Any) -> ContextDouble:
        assert strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.trt.contexts.append(ContextDouble(self))
        return self.trt.contexts[-1]


class ContextDouble(PlanContextDouble):
    engine: EngineDouble
    profile: int | None = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._change()
        self.engine.cuda._known(stream_handle)
        if self.shapes:
            raise FaultError("another profile was chosen after shapes were set, which TensorRT then forgets")
        self.profile = profile_index
        return True

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not any(isinstance(dim, str) for dim in self.engine.inputs[name].shape):
            return
        if self.profile is None:
            raise FaultError("no profile was chosen")
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            raise FaultError(f"{name}: {shape} is not within profile {self.profile}, {least} to {most}")


def misremembered_calls(real_trt: Any, runtime: Any) -> list[str]:
    """Calls of the double that do not exist in the real bindings, or that have other parameters there. runtime: the
    bindings' class ``Runtime``.
    """
    kinds = {
        RuntimeDouble: runtime,
        EngineDouble: real_trt.ICudaEngine,
        ContextDouble: real_trt.IExecutionContext,
    }
    return misremembered(kinds)
