"""Target ``tensorrt``: graphs with TriMode's plugins and the plugins' kernels; once compiled, also plans.

``kernels/`` holds the kernels for each compute capability. ``trimode compile`` adds ``engine.plan`` and
``builder.log``, TensorRT's warnings, to both engines' folders.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from trimode.common.installation import Installation
from trimode.engine.record import Record
from trimode.engine.targets.section import KernelSection, compute_capabilities

GRAPH, PLAN, BUILDER_LOG = "graph.onnx", "engine.plan", "builder.log"


Operators = Literal["standard", "plugins"]


class TensorrtPlans(Record):
    """The version of TensorRT and the GPU that compiled the plans. They run on that model of GPU only."""

    tensorrt: str
    gpu: str
    compute_capability: PositiveInt


class TensorrtSection(KernelSection):
    """operators: what multiplies weights that are not int4, as in 16-bit heads and the draft adapter. ``standard``:
    standard operators. ``plugins``: plugins, as for the rest of the graphs up to the logits.
    plugins: the number of plugin nodes in each engine's graph. plans: None until ``trimode compile``.
    """

    name: Literal["tensorrt"] = "tensorrt"
    operators: Operators
    plugins: dict[str, PositiveInt]
    plans: TensorrtPlans | None

    @property
    def engine_files(self) -> tuple[str, ...]:
        return (GRAPH,) if self.plans is None else (GRAPH, PLAN, BUILDER_LOG)

    @property
    def summary(self) -> str:
        plans = self.plans
        compiled = "TensorRT, not compiled yet" if plans is None else f"TensorRT {plans.tensorrt} on {plans.gpu}"
        products = "standard operators" if self.operators == "standard" else "plugins"
        return f"{compiled}; 16-bit products by {products}; kernels for {compute_capabilities(self.sms)}"


def has_tensorrt(installation: Installation) -> bool:
    """Whether TensorRT is installed, as the package of the extra ``[tensorrt]`` or as NVIDIA's containers have it."""
    return installation.has("tensorrt-cu13") or installation.has("tensorrt")


SECTION = TensorrtSection
