"""Write graphs and launch lists of target ``cuda``."""

from __future__ import annotations

from pathlib import Path

import onnx

from trimode.build.gpu.kernel_network import KernelNetwork
from trimode.common.progress import Progress
from trimode.engine.targets.cuda import GRAPH


def write_launches(network: KernelNetwork, folder: Path, progress: Progress) -> None:
    """Write ``graph.onnx`` and ``launches.json`` of both engines into the engine directory ``folder``."""
    progress("graphs", 0, 1)
    for name, lowered in network.lowered.items():
        (folder / name).mkdir()
        onnx.save(lowered.graph, folder / name / GRAPH)
        lowered.launches.write(folder / name)
    progress("graphs", 1, 1)
