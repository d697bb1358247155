"""The graphs of target ``tensorrt``, with plugin nodes.

:mod:`trimode.build.tensorrt.plan_compilation` compiles them.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from trimode.build.gpu.kernel_emission import plugin_nodes
from trimode.build.gpu.kernel_network import KernelNetwork
from trimode.build.graph.operator_network import build_operator_network
from trimode.common.progress import Progress
from trimode.engine.targets.tensorrt import GRAPH, Operators
from trimode.model.step import ENGINES


def write_graphs(network: KernelNetwork, folder: Path, operators: Operators, progress: Progress) -> dict[str, int]:
    """Write both graphs into the engine directory ``folder``. Returns the number of plugin nodes of each."""
    options = network.graph_options()._replace(
        standard_results=True, standard_products=operators == "standard", capacity=network.limits.capacity
    )
    progress("graphs", 0, 1)
    plugins = {}
    for name, pattern in ENGINES:
        graph = build_operator_network(network.config, network.pool, pattern, options)
        onnx.checker.check_model(graph)
        (folder / name).mkdir()
        onnx.save(graph, folder / name / GRAPH)
        plugins[name] = len(plugin_nodes(graph))
    progress("graphs", 1, 1)
    return plugins
