"""Target ``rtx``: TensorRT-RTX plans without their weights, which both plans share in the pool.

``graph.onnx`` is the graph that a plan was compiled from, ``layers.json`` the list of its kernels.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from trimode.engine.plan_file import PlanEntry
from trimode.engine.targets.section import TargetSection, compute_capabilities

PLAN, GRAPH, KERNELS = "engine.plan", "graph.onnx", "layers.json"
# GPUs that TensorRT-RTX compiles for; 121 is compute capability 12.1.
COMPUTE_CAPABILITIES = (75, 80, 86, 89, 120, 121)


class RtxSection(TargetSection):
    """tensorrt_rtx: the version that compiled the plans. sms: their compute capabilities, 121 for 12.1."""

    name: Literal["rtx"] = "rtx"
    tensorrt_rtx: str
    sms: tuple[PositiveInt, ...]
    ar: PlanEntry
    diffusion: PlanEntry

    @property
    def engine_files(self) -> tuple[str, ...]:
        return PLAN, GRAPH, KERNELS

    @property
    def summary(self) -> str:
        return f"TensorRT-RTX {self.tensorrt_rtx} on {compute_capabilities(self.sms)}"


SECTION = RtxSection
