"""What the directories of targets with kernels of our own have in common, byte for byte: the weight pool and the
kernels. So one is made from the other without the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import onnx

from trimode.build.gpu.kernel_emission import (
    NeededKernel,
    kernels_of,
    plugin_nodes,
    refuse_odd_groups,
    refuse_unknown_gpus,
    write_kernels,
)
from trimode.build.graph.lowering import launch_list
from trimode.build.graph.operator_network import OperatorNetworkOptions, build_operator_network
from trimode.build.graph.raw_pool import RawPool, write_raw_pool
from trimode.build.graph.results import REAL_TYPES
from trimode.build.sharded_checkpoint import sharded
from trimode.common.progress import Progress
from trimode.engine.files import POOL, rank_folder
from trimode.engine.kernel_library import KERNELS
from trimode.engine.launch_list import LaunchList
from trimode.engine.manifest import Limits
from trimode.engine.precision import NUMPY_TYPES, Real
from trimode.model.checkpoint import Checkpoint
from trimode.model.config import ModelConfig
from trimode.model.step import ENGINES
from trimode.plugins.launches import PassShape, plan_pass

# Parts of a sequence's KV rows that attention computes in parallel. With 8 KV heads, the attention of one request then
# has about as many programs as a large GPU has multiprocessors.
SPLITS = 16


class LoweredGraph(NamedTuple):
    """A graph of our own operators only, and the same as a list of launches."""

    graph: onnx.ModelProto
    launches: LaunchList


@dataclass(frozen=True)
class KernelNetwork:
    """A network over a weight pool for our kernels, or the part of it that one of ``ranks`` ranks holds.

    rank: of the draft adapter; 0 without one. real: type of the activations, and of the matrices that are not int4.
    """

    config: ModelConfig
    pool: RawPool
    rank: int
    real: Real
    limits: Limits
    ranks: int = 1

    @cached_property
    def lowered(self) -> dict[str, LoweredGraph]:
        """Both engines, by name."""
        weights = {entry.name for entry in self.pool.ranges()}
        lowered = {}
        for name, pattern in ENGINES:
            graph = build_operator_network(self.config, self.pool, pattern, self.graph_options())
            onnx.checker.check_model(graph)
            lowered[name] = LoweredGraph(graph, launch_list(graph, REAL_TYPES[self.real], weights))
        return lowered

    @property
    def plugins(self) -> LaunchList:
        """The nodes of our own operators if TensorRT computes the results: the head is a product that writes logits."""
        options = self.graph_options()._replace(standard_results=True)
        graph = build_operator_network(self.config, self.pool, "causal", options)
        ours = plugin_nodes(graph)
        read = {name for node in ours for name in node.input}
        inputs = [value for value in graph.graph.input if value.name in read]
        extracted = onnx.helper.make_model(onnx.helper.make_graph(ours, "plugins", inputs, []))
        return launch_list(extracted, REAL_TYPES[self.real], {entry.name for entry in self.pool.ranges()})

    def graph_options(self) -> OperatorNetworkOptions:
        """Of the graphs of our own operators only."""
        return OperatorNetworkOptions(self.real, self.limits.top_k, SPLITS, self.rank, ranks=self.ranks)


def write_pool_and_kernels(
    checkpoint: Checkpoint,
    folder: Path,
    target: str,
    real: Real,
    sms: tuple[int, ...],
    limits: Limits,
    progress: Progress,
) -> KernelNetwork:
    """Write the weight pool and the kernels of both engines into the engine directory ``folder``, as
    :func:`write_ranks` does for a single rank.
    """
    return write_ranks(checkpoint, folder, target, real, sms, limits, 1, progress)[0]


def write_ranks(
    checkpoint: Checkpoint,
    folder: Path,
    target: str,
    real: Real,
    sms: tuple[int, ...],
    limits: Limits,
    ranks: int,
    progress: Progress,
) -> list[KernelNetwork]:
    """Write the weight pool of each rank, and the kernels of all, into the engine directory ``folder``. Returns the
    ranks' parts of the network.

    target: its name, for errors. sms: compute capabilities, 121 for 12.1. Raises TriModeError if our kernels are not
    for one of them, or cannot multiply the checkpoint's int4 weights, or the checkpoint cannot be divided.
    """
    refuse_unknown_gpus(sms)
    refuse_odd_groups(checkpoint, target)
    networks = []
    for number, part in enumerate(sharded(checkpoint, ranks)):
        file = folder / rank_folder(number, ranks) / POOL
        file.parent.mkdir(parents=True)
        pool = write_raw_pool(part, file, progress, NUMPY_TYPES[real], "kernels")
        rank = checkpoint.adapter.config.r if checkpoint.adapter else 0
        networks.append(KernelNetwork(part.config, pool, rank, real, limits, ranks))
    write_network_kernels(networks, folder, sms, progress)
    return networks


def write_network_kernels(
    networks: Sequence[KernelNetwork], folder: Path, sms: tuple[int, ...], progress: Progress
) -> None:
    """Compile every kernel of both engines of all ranks into the engine directory ``folder``."""
    needed: dict[str, NeededKernel] = {}
    for network in networks:
        plugins = [network.plugins] if len(networks) == 1 else []
        for launches in (*(lowered.launches for lowered in network.lowered.values()), *plugins):
            needed |= needed_kernels(launches, network.limits)
    real = networks[0].real
    if real == "fp32":
        needed = _smallest_tiles(needed)
    write_kernels(needed, real, sms, folder / KERNELS, progress)


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


def _smallest_tiles(needed: dict[str, NeededKernel]) -> dict[str, NeededKernel]:
    """One tactic of each kernel: fp32 is for proofs, and the compiler needs minutes for its large tiles."""
    smallest: dict[str, str] = {}
    for name in sorted(needed, key=lambda name: needed[name].tactic.constants.get("BLOCK_M", 0)):
        smallest.setdefault(name.rpartition(".")[0], name)
    return {name: needed[name] for name in smallest.values()}
