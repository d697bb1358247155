"""Target ``rtx``: TensorRT-RTX plans without their weights, which both plans share in the pool.

``graph.onnx`` is the graph that a plan was compiled from, ``layers.json`` the list of its kernels.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from trimode.engine.plan_file import PlanEntry
from trimode.engine.record import Record
from trimode.engine.targets.section import TargetSection, compute_capabilities

PLAN, GRAPH, KERNELS = "engine.plan", "graph.onnx", "layers.json"
# GPUs that TensorRT-RTX compiles for; 121 is compute capability 12.1.
COMPUTE_CAPABILITIES = (75, 80, 86, 89, 120, 121)


class RankPlans(Record):
    """How both plans of a rank are assembled."""

    ar: PlanEntry
    diffusion: PlanEntry


class RtxSection(TargetSection):
    """tensorrt_rtx: the version that compiled the plans. sms: their compute capabilities, 121 for 12.1. plans: by rank,
    one without ranks. The constants of ranks differ a little, since one of them holds the mask token.
    """

    name: Literal["rtx"] = "rtx"
    tensorrt_rtx: str
    sms: tuple[PositiveInt, ...]
    plans: tuple[RankPlans, ...]

    @property
    def ar(self) -> PlanEntry:
        """Of the first rank."""
        return self.plans[0].ar

    @property
    def diffusion(self) -> PlanEntry:
        """Of the first rank."""
        return self.plans[0].diffusion

    @property
    def engine_files(self) -> tuple[str, ...]:
        return PLAN, GRAPH, KERNELS

    @property
    def summary(self) -> str:
        return f"TensorRT-RTX {self.tensorrt_rtx} on {compute_capabilities(self.sms)}"


SECTION = RtxSection
