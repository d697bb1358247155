"""Deserialise both plans of an engine directory. They contain no weights and need no plugin library: our kernels are
part of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorrt as trt

from trimode.common.errors import TriModeError
from trimode.engine.targets.tensorrt import PLAN, TensorrtPlans
from trimode.model.step import ENGINES
from trimode.runtime.gpu.plan_log import LastErrorLog
from trimode.runtime.gpu.plan_version import release


class _TensorrtLog(LastErrorLog, trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        LastErrorLog.__init__(self, "TensorRT")

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        self.keep(message, severity <= trt.ILogger.Severity.ERROR)


# TensorRT uses the first logger of a process for all runtimes.
LOG = _TensorrtLog()


def load_plans(engine: Path, plans: TensorrtPlans) -> dict[str, Any]:
    """The engines (``ICudaEngine``) by the names of :data:`trimode.model.step.ENGINES`.

    Raises TriModeError if another version of TensorRT compiled them, or it cannot load one.
    """
    if release(plans.tensorrt) != release(trt.__version__):
        raise TriModeError(
            f"{engine} was compiled with TensorRT {plans.tensorrt}, this is {trt.__version__}; "
            f"pip install tensorrt-cu13=={plans.tensorrt}, or compile it again"
        )
    runtime = trt.Runtime(LOG)
    return {name: _deserialise(runtime, engine / name / PLAN) for name, _ in ENGINES}


def _deserialise(runtime: Any, plan: Path) -> Any:
    loaded = runtime.deserialize_cuda_engine(plan.read_bytes())
    if loaded is None:
        raise TriModeError(f"{plan}: TensorRT cannot load it ({LOG.complaint}); compile the engine again")
    return loaded
