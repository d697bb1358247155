"""Estimate of tensor parallelism on GPUs: the roofline of a rank's pass, and the time of its sums over a link.

Nothing here was measured: ranks were not run on GPUs yet. The estimate decides whether they would pay.

A rank moves its part of the weights and of the KV rows (:mod:`trimode.model.shards`), at the lower bound of
:mod:`trimode.build.roofline`. It then waits for two sums in each layer, and once for the candidates of the head. They
do not overlap with other work, since each needs the result before it. Sums are in the order of ranks and done in one of
two ways, whichever takes less:

- *one step*: every rank reads the partial sums of all others, and adds them;
- *two steps*: every rank adds up 1/N of the rows of all ranks, then reads the other rows' totals.

The latency of a step is an assumption of each link. For few tokens it is nearly all of the time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import BaseModel

from trimode.build.roofline import (
    ADAPTER_RANK,
    INTEGER_BYTES,
    LOGIT_BYTES,
    REAL_BYTES,
    TOP_K,
    GpuModel,
    PassShape,
    WeightFormat,
    least_bytes,
    least_flops,
    pass_seconds,
    stored_matrix_bytes,
    uniform_matrix_bytes,
)
from trimode.common.errors import TriModeError
from trimode.engine.precision import Precision
from trimode.model.config import ModelConfig
from trimode.model.shards import Shard

RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes/s that a GPU receives. latency: seconds of an exchange of few bytes, kernel launch included."""

    key: str
    name: str
    bandwidth: float
    latency: float


# Bandwidths from data sheets: half of the total of both directions. Latencies are assumed: published all-reduces of a
# few kilobytes within a node take 5 to 10 microseconds over NVLink; the others are two and four times as long.
LINKS: dict[str, Link] = {
    link.key: link
    for link in (
        Link("nvlink5", "NVLink 5", 900e9, 6e-6),
        Link("nvlink4", "NVLink 4", 450e9, 6e-6),
        Link("nvlink3", "NVLink 3", 300e9, 6e-6),
        Link("pcie5", "PCIe 5.0 x16", 64e9, 12e-6),
        Link("pcie4", "PCIe 4.0 x16", 32e9, 12e-6),
        Link("cx7", "ConnectX-7, 200 Gbit/s", 25e9, 24e-6),
    )
}


# The link that a GPU usually has to others of its kind.
LINK_OF = {
    "dgx-spark": "cx7",
    "rtx-pro-6000": "pcie5",
    "rtx-5090": "pcie5",
    "rtx-4090": "pcie4",
    "rtx-3090": "pcie4",
    "a100-80gb": "nvlink3",
    "h100": "nvlink4",
    "b200": "nvlink5",
    "gb200": "nvlink5",
}


def find_link(key: str | None, gpu: str) -> Link:
    """key: None for the usual link of ``gpu``. Raises TriModeError that names the known links."""
    key = key or LINK_OF[gpu]
    if key not in LINKS:
        raise TriModeError(f"link {key} is not known; known are {', '.join(LINKS)}")
    return LINKS[key]


class RankEstimate(BaseModel):
    """Of ``ranks`` GPUs. ar, cycle: seconds of an AR pass, and of a self-speculation cycle (a draft and its
    verification). *_speedup: against one GPU. sums: the share of an AR pass that is spent in sums.
    """

    ranks: int
    ar: float
    cycle: float
    ar_speedup: float
    cycle_speedup: float
    sums: float


def sum_seconds(link: Link, ranks: int, size: int) -> float:
    """A sum of ``size`` bytes over all ranks."""
    if ranks == 1:
        return 0.0
    one_step = link.latency + (ranks - 1) * size / link.bandwidth
    two_steps = 2 * (link.latency + (ranks - 1) / ranks * size / link.bandwidth)
    return min(one_step, two_steps)


def exchange_seconds(config: ModelConfig, shape: PassShape, link: Link, ranks: int) -> float:
    """All sums of a pass, and the candidates of the head. config: of the whole network."""
    if ranks == 1:
        return 0.0
    size = REAL_BYTES * shape.batch * shape.step * config.hidden_size
    candidates = shape.batch * shape.rows * (shape.top_k * (LOGIT_BYTES + INTEGER_BYTES) + LOGIT_BYTES)
    gathered = link.latency + (ranks - 1) * candidates / link.bandwidth
    return 2 * config.num_hidden_layers * sum_seconds(link, ranks, size) + gathered


Weights = WeightFormat | Precision  # of a network of one format, or of an engine


def rank_seconds(gpu: GpuModel, config: ModelConfig, weights: Weights, shape: PassShape, ranks: int) -> float:
    """A rank's part of a pass at the lower bound, without exchanges. Raises ValueError if the network cannot be divided
    among so many ranks.
    """
    if config.num_key_value_heads % ranks:
        raise ValueError(f"{config.num_key_value_heads} KV heads are not a multiple of {ranks} ranks")
    part = Shard(0, ranks).config(config)
    if isinstance(weights, Precision):
        matrices = stored_matrix_bytes(part, weights)
    else:
        matrices = uniform_matrix_bytes(part, weights)
    moved = least_bytes(part, shape, matrices)
    return pass_seconds(gpu, moved, least_flops(part, shape))


def estimates(
    gpu: GpuModel,
    link: Link,
    config: ModelConfig,
    weights: Weights,
    *,
    window: int,
    batch: int = 1,
    block_length: int = 32,
) -> list[RankEstimate]:
    """For each number of ranks that divides the KV heads. window: KV rows of each of ``batch`` sequences."""
    one = PassShape(batch, 1, window, 1, TOP_K)
    block = PassShape(batch, block_length, window, block_length, TOP_K)
    found: list[RankEstimate] = []
    for ranks in (ranks for ranks in RANKS if config.num_key_value_heads % ranks == 0):

        def seconds(shape: PassShape, ranks: int = ranks) -> float:
            alone = rank_seconds(gpu, config, weights, shape, ranks)
            return alone + exchange_seconds(config, shape, link, ranks)

        ar, cycle = seconds(one), seconds(block) + seconds(replace(block, adapter_rank=ADAPTER_RANK))
        first = found[0] if found else None
        found.append(
            RankEstimate(
                ranks=ranks,
                ar=ar,
                cycle=cycle,
                ar_speedup=first.ar / ar if first else 1.0,
                cycle_speedup=first.cycle / cycle if first else 1.0,
                sums=exchange_seconds(config, one, link, ranks) / ar,
            )
        )
    return found
