"""Write graphs, launch lists, the weight pool and the kernels of target ``cuda``."""

from __future__ import annotations

from pathlib import Path

import onnx

from trimode.build.cuda.lowering import launch_list
from trimode.build.gpu_target import SPLITS
from trimode.build.graph.network import REAL_TYPES
from trimode.build.graph.operator_network import OperatorNetworkOptions, build_operator_network
from trimode.build.graph.raw_pool import RawPool, write_raw_pool
from trimode.build.kernel_emission import (
    NeededKernel,
    kernels_of,
    refuse_odd_groups,
    refuse_unknown_gpus,
    write_kernels,
)
from trimode.common.progress import Progress
from trimode.engine.files import POOL
from trimode.engine.kernel_library import KERNELS
from trimode.engine.launch_list import LaunchList
from trimode.engine.manifest import Limits, PoolEntry
from trimode.engine.precision import NUMPY_TYPES, Real
from trimode.engine.targets.cuda import GRAPH
from trimode.model.checkpoint import Checkpoint
from trimode.model.config import ModelConfig
from trimode.model.step import ENGINES
from trimode.plugins.launches import PassShape, plan_pass


def write_cuda_engines(
    checkpoint: Checkpoint,
    folder: Path,
    real: Real,
    sms: tuple[int, ...],
    limits: Limits,
    progress: Progress,
) -> tuple[PoolEntry, ...]:
    """Write everything but the manifest into ``folder``. Returns the ranges of the pool.

    sms: compute capabilities, 121 for 12.1.
    """
    refuse_unknown_gpus(sms)
    refuse_odd_groups(checkpoint, "cuda")
    (folder / POOL).parent.mkdir()
    pool = write_raw_pool(checkpoint, folder / POOL, progress, NUMPY_TYPES[real], "tiles", for_kernels=True)
    rank = checkpoint.adapter.config.r if checkpoint.adapter else 0
    write_launches_and_kernels(checkpoint.config, pool, rank, folder, real, sms, limits, progress)
    return pool.entries()


def write_launches_and_kernels(
    config: ModelConfig,
    pool: RawPool,
    rank: int,
    folder: Path,
    real: Real,
    sms: tuple[int, ...],
    limits: Limits,
    progress: Progress,
) -> None:
    """Write both engines' graphs and launch lists, and the kernels. rank: of the draft adapter; 0 without one."""
    options = OperatorNetworkOptions(real, limits.top_k, SPLITS, rank)
    needed: dict[str, NeededKernel] = {}
    for index, (name, pattern) in enumerate(ENGINES):
        progress("graphs", index, len(ENGINES))
        graph = build_operator_network(config, pool, pattern, options)
        onnx.checker.check_model(graph)
        (folder / name).mkdir()
        onnx.save(graph, folder / name / GRAPH)
        launches = launch_list(graph, REAL_TYPES[real], {entry.name for entry in pool.ranges()})
        launches.write(folder / name)
        needed |= needed_kernels(launches, limits)
    if real == "fp32":
        needed = _smallest_tiles(needed)
    progress("graphs", len(ENGINES), len(ENGINES))
    write_kernels(needed, real, sms, folder / KERNELS, progress)


def _smallest_tiles(needed: dict[str, NeededKernel]) -> dict[str, NeededKernel]:
    """One tactic of each kernel: fp32 is for proofs, and the compiler needs minutes for its large tiles."""
    smallest: dict[str, str] = {}
    for name in sorted(needed, key=lambda name: needed[name].tactic.constants.get("BLOCK_M", 0)):
        smallest.setdefault(name.rpartition(".")[0], name)
    return {name: needed[name] for name in smallest.values()}


def needed_kernels(launches: LaunchList, limits: Limits) -> dict[str, NeededKernel]:
    """Every tactic of every launch of any pass, by the name of its kernel."""
    needed: dict[str, NeededKernel] = {}
    for top_k in (1, limits.top_k):
        for masked in (False, True):
            # Kernels depend on the fixed sizes only, so the sizes of a pass are arbitrary.
            shape = PassShape(1, 1, 1, limits.capacity, top_k, masked, asked=1)
            for launch in plan_pass(launches, shape):
                needed |= kernels_of(launch.operator, launch.node)
    return needed
