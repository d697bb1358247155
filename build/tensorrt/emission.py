"""The first step of target ``tensorrt``, which needs no GPU: both graphs with plugin nodes, the weight pool, and the
plugins' kernels for each GPU of a list. :mod:`trimode.build.tensorrt.plan_compilation` compiles the graphs.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from trimode.build.gpu_target import SPLITS
from trimode.build.graph.network import NetworkOptions, PluginOptions, build_network
from trimode.build.graph.raw_pool import write_raw_pool
from trimode.build.kernel_emission import (
    needed_kernels,
    plugin_nodes,
    refuse_odd_groups,
    refuse_unknown_gpus,
    write_kernels,
)
from trimode.common.progress import Progress
from trimode.engine.files import POOL
from trimode.engine.kernel_library import KERNELS
from trimode.engine.manifest import Limits, PoolEntry
from trimode.engine.precision import NUMPY_TYPES, Real
from trimode.engine.targets.tensorrt import GRAPH
from trimode.model.checkpoint import Checkpoint
from trimode.model.step import ENGINES


def write_graphs(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: Real,
    sms: tuple[int, ...],
    limits: Limits,
    progress: Progress,
) -> tuple[dict[str, int], tuple[PoolEntry, ...]]:
    """Write graphs, pool and kernels into ``folder``. Returns the number of plugin nodes of each engine's graph, and
    the ranges of the pool, which are inputs of the graphs.

    sms: compute capabilities, 121 for 12.1.
    """
    refuse_unknown_gpus(sms)
    refuse_odd_groups(checkpoint, "tensorrt")
    options = NetworkOptions(
        top_k=limits.top_k,
        adapter=checkpoint.adapter is not None,
        activations=dtype,
        capacity=limits.capacity,
        masks="apart",
        plugins=PluginOptions(splits=SPLITS, rank=checkpoint.adapter.config.r if checkpoint.adapter else 0),
    )
    (folder / POOL).parent.mkdir()
    pool = write_raw_pool(checkpoint, folder / POOL, progress, NUMPY_TYPES[dtype], "tiles")
    graphs = {}
    for index, (name, pattern) in enumerate(ENGINES):
        progress("graphs", index, len(ENGINES))
        graph = build_network(checkpoint.config, pool, pattern, options)
        onnx.checker.check_model(graph)
        (folder / name).mkdir()
        onnx.save(graph, folder / name / GRAPH)
        graphs[name] = graph
    progress("graphs", len(ENGINES), len(ENGINES))
    needed = needed_kernels(list(graphs.values()), checkpoint.config)
    write_kernels(needed, dtype, sms, folder / KERNELS, progress)
    plugins = {name: len(plugin_nodes(graph)) for name, graph in graphs.items()}
    return plugins, pool.entries()
