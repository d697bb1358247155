"""Target ``tensorrt``, the part that needs no GPU: both graphs with the plugins' operators, the pool that both bind,
and the plugins' kernels for every named GPU. :mod:`trimode.build.tensorrt.plans` compiles what is written here.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from trimode.build.graph.network import NetworkOptions, build_network
from trimode.build.graph.raw_pool import write_raw_pool
from trimode.build.tensorrt.kernel_emission import needed_kernels, plugin_nodes, write_kernels
from trimode.common.errors import TriModeError
from trimode.common.progress import Progress
from trimode.engine.files import POOL
from trimode.engine.manifest import PoolEntry
from trimode.engine.precision import NUMPY_TYPES
from trimode.engine.targets.tensorrt import GRAPH, PLUGIN_KERNELS
from trimode.model.checkpoint import Checkpoint
from trimode.model.step import ENGINES
from trimode.plugins.operators.int4_product import LEAST_GROUP

COMPUTE_CAPABILITIES = (80, 86, 89, 90, 100, 120, 121)
# With 8 key-value heads, as many programs of one request's attention as a large GPU has multiprocessors.
SPLITS = 16


def write_graphs(
    checkpoint: Checkpoint, folder: Path, options: NetworkOptions, sms: tuple[int, ...], progress: Progress
) -> tuple[dict[str, int], tuple[PoolEntry, ...]]:
    """Write graphs, pool and kernels into ``folder``; returns how many plugins each graph has, and the ranges of the
    pool, by the graphs' inputs.

    sms: compute capabilities, 121 for 12.1.
    """
    _refuse_unknown_gpus(sms)
    _refuse_odd_groups(checkpoint)
    (folder / POOL).parent.mkdir()
    pool = write_raw_pool(checkpoint, folder / POOL, progress, NUMPY_TYPES[options.activations])
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
    write_kernels(needed, options.activations, sms, folder / PLUGIN_KERNELS, progress)
    plugins = {name: len(plugin_nodes(graph)) for name, graph in graphs.items()}
    entries = (PoolEntry(name=entry.name, offset=entry.offset, bytes=entry.length) for entry in pool.ranges())
    return plugins, tuple(entries)


def _refuse_unknown_gpus(sms: tuple[int, ...]) -> None:
    for sm in sms:
        if sm not in COMPUTE_CAPABILITIES:
            raise TriModeError(f"--sm {sm}: kernels are compiled for {', '.join(map(str, COMPUTE_CAPABILITIES))}")


def _refuse_odd_groups(checkpoint: Checkpoint) -> None:
    quantization = checkpoint.quantization
    if quantization is not None and quantization.group_size % LEAST_GROUP:
        raise TriModeError(
            f"{checkpoint.folder} is int4 in groups of {quantization.group_size}; target tensorrt takes multiples of "
            f"{LEAST_GROUP}"
        )
