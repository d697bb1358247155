"""The graphs of target ``tensorrt``, with plugin nodes.

:mod:`trimode.build.tensorrt.plan_compilation` compiles them.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from trimode.build.graph.network import NetworkOptions, PluginOptions, build_network
from trimode.build.graph.operator_network import OperatorNetworkOptions, build_operator_network
from trimode.build.kernel_emission import plugin_nodes
from trimode.build.kernel_network import SPLITS, KernelNetwork
from trimode.common.progress import Progress
from trimode.engine.targets.tensorrt import GRAPH, Operators
from trimode.model.step import ENGINES, AttentionPattern


def write_graphs(network: KernelNetwork, folder: Path, operators: Operators, progress: Progress) -> dict[str, int]:
    """Write both graphs into the engine directory ``folder``. Returns the number of plugin nodes of each."""
    progress("graphs", 0, 1)
    plugins = {}
    for name, pattern in ENGINES:
        graph = _graph(network, pattern, operators)
        onnx.checker.check_model(graph)
        (folder / name).mkdir()
        onnx.save(graph, folder / name / GRAPH)
        plugins[name] = len(plugin_nodes(graph))
    progress("graphs", 1, 1)
    return plugins


def _graph(network: KernelNetwork, pattern: AttentionPattern, operators: Operators) -> onnx.ModelProto:
    top_k, capacity = network.limits.top_k, network.limits.capacity
    if operators == "plugins":
        of_plugins = OperatorNetworkOptions(
            network.real, top_k, SPLITS, network.rank, standard_results=True, capacity=capacity
        )
        return build_operator_network(network.config, network.pool, pattern, of_plugins)
    options = NetworkOptions(
        top_k=top_k,
        adapter=network.rank > 0,
        activations=network.real,
        capacity=capacity,
        masks="apart",
        plugins=PluginOptions(splits=SPLITS, rank=network.rank),
    )
    return build_network(network.config, network.pool, pattern, options)
