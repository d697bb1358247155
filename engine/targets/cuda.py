"""Target ``cuda``: lists of kernel launches and the kernels, which the runtime launches through the CUDA driver.

``kernels/`` holds the kernels for each compute capability. ``graph.onnx`` is the graph that a list was made from.
"""

from __future__ import annotations

from typing import Literal

from trimode.engine.launch_list import LAUNCHES
from trimode.engine.targets.section import KernelSection, compute_capabilities

GRAPH = "graph.onnx"


class CudaSection(KernelSection):
    name: Literal["cuda"] = "cuda"

    @property
    def engine_files(self) -> tuple[str, ...]:
        return LAUNCHES, GRAPH

    @property
    def summary(self) -> str:
        return f"launches of TriMode's kernels, for {compute_capabilities(self.sms)}"


SECTION = CudaSection
