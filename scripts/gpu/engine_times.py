"""The part of the GPU check that times an engine without weights: passes, cycles, the kernels of a pass, a prefill."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from scripts.gpu.random_weights import random_engine, randomise
from scripts.gpu.torch_device import TorchDevice
from trimode.engine.manifest import Manifest
from trimode.plugins.launches import PlannedLaunch
from trimode.runtime.cuda.cuda_executor import CudaExecutor
from trimode.runtime.cuda.cuda_network import CudaNetwork
from trimode.runtime.executor import BidirectionalStep, CausalStep
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import BoundLaunch, Device

MASK = 100
Record = dict[str, Any]
# The launches of each pass that was captured.
Prepared = dict[Bucket, list[tuple[PlannedLaunch, BoundLaunch]]]


@dataclass(frozen=True)
class TimedSizes:
    """batches: of the timed passes, by committed KV rows; for each number of rows, the engine has slots for the largest
    batch. block: tokens of a draft. prefill: tokens of a prompt. untimed, repeats: runs of a pass. graph_repeats,
    replays: repeats of the graph of a kernel's launches, and its replays in each.
    """

    batches: Mapping[int, tuple[int, ...]]
    block: int
    prefill: int
    untimed: int
    repeats: int
    graph_repeats: int
    replays: int


SIZES_8B = TimedSizes(
    batches={512: (1, 4, 16), 4096: (1, 4, 16), 32768: (1,)},
    block=32,
    prefill=2048,
    untimed=3,
    repeats=20,
    graph_repeats=6,
    replays=5,
)


def times_of_engine(folder: Path, shape: str, torch_device: TorchDevice, sizes: TimedSizes) -> Iterator[Record]:
    """Milliseconds of passes and cycles, and of each kernel of a pass, with random weights."""
    with random_engine(folder / "engines" / shape, torch_device) as (engine, manifest, device, weights):
        read_bytes = weights.size - next(entry.bytes for entry in manifest.pool if entry.name == "encoder.embed_tokens")
        for rows, batches in sizes.batches.items():
            capacity = max(rows, sizes.prefill) + 4 * sizes.block
            limits = manifest.limits.model_copy(update={"capacity": capacity, "max_batch": max(batches)})
            sized = manifest.model_copy(update={"limits": limits})
            prepared: Prepared = {}
            with patch.object(CudaNetwork, "prepare", recording(prepared)):
                started = time.perf_counter()
                executor = CudaExecutor(engine, sized, device, weights)
                randomise(torch_device, executor.pool.memory)
                memory = {"weights": weights.size, "kv": executor.pool.limit_bytes, "activations": executor.arena_bytes}
                yield {"what": f"{shape}: loaded", "seconds": time.perf_counter() - started, "bytes": memory}
                for batch in batches:
                    yield from passes_of(shape, executor, sizes, rows, batch, read_bytes)
                    if batch == 1:
                        for bucket, launches in list(prepared.items()):
                            if bucket.batch == 1:
                                yield from kernels_of(shape, device, sizes, bucket, launches, rows)
                        prepared.clear()
                if rows == min(sizes.batches):
                    yield prefill_of(shape, executor, sizes, manifest)
            del executor
            gc.collect()


def recording(prepared: Prepared) -> Callable[..., Any]:
    original = CudaNetwork.prepare

    def prepare(network: CudaNetwork, bucket: Bucket, *tensors: Any) -> list[tuple[PlannedLaunch, BoundLaunch]]:
        prepared[bucket] = original(network, bucket, *tensors)
        return prepared[bucket]

    return prepare


def passes_of(
    shape: str, executor: CudaExecutor, sizes: TimedSizes, rows: int, batch: int, read: int
) -> Iterator[Record]:
    while executor.pool.active < batch:
        executor.pool.acquire()
    block, committed = sizes.block, np.full(batch, rows)
    one = CausalStep.chain(0, np.full((batch, 1), 300), committed, np.zeros((batch, 1), int), top_k=1)
    ids = np.full((batch, block), MASK)
    ids[:, 0] = 300
    all_rows = np.tile(np.arange(block), (batch, 1))
    draft = BidirectionalStep.block(
        0, ids, committed, all_rows, np.full(batch, block), np.ones(batch, np.bool_), top_k=1
    )
    verify = draft.verification(top_k=1)
    kv = batch * rows * executor.pool.row_bytes
    for what, run, passes in (
        ("ar pass", lambda: executor.run(one), 1),
        ("draft", lambda: executor.run(draft), 1),
        ("verify", lambda: executor.run(verify), 1),
        ("cycle", lambda: executor.speculate(draft, 1), 2),
    ):
        times = _wall_times(run, sizes)
        yield {
            "what": f"{shape}: {what}",
            "rows": rows,
            "batch": batch,
            "ms": statistics.median(times),
            "fastest_ms": min(times),
            "least_bytes": passes * (read + kv),
        }


def _wall_times(run: Callable[[], object], sizes: TimedSizes) -> list[float]:
    """Milliseconds of each run, after some that are not timed."""
    times = []
    for repeat in range(sizes.untimed + sizes.repeats):
        started = time.perf_counter()
        run()
        if repeat >= sizes.untimed:
            times.append(1e3 * (time.perf_counter() - started))
    return times


def kernels_of(
    shape: str,
    device: Device,
    sizes: TimedSizes,
    bucket: Bucket,
    launches: list[tuple[PlannedLaunch, BoundLaunch]],
    rows: int,
) -> Iterator[Record]:
    """Microseconds of the launches of each kernel in a pass, as a CUDA graph of these launches alone.

    Launches over several layers read other weights each time, as in a pass.
    """
    groups: dict[str, list[BoundLaunch]] = defaultdict(list)
    for planned, launch in launches:
        constants = planned.operator.constants(planned.node)
        name = ".".join((planned.operator.name, *(f"{key}{value}" for key, value in constants.items())))
        groups[name].append(launch)
    total = _graph_microseconds(device, sizes, [launch for _, launch in launches])
    record = {"rows": rows, "batch": bucket.batch, "step": bucket.step, "kind": bucket.kind.__name__}
    yield {"what": f"{shape}: kernels of a pass", **record, "launches": len(launches), "microseconds": total}
    for name, members in groups.items():
        took = _graph_microseconds(device, sizes, members)
        grid = members[0].grid
        yield {"what": name, **record, "launches": len(members), "microseconds": took, "grid": grid}


def _graph_microseconds(device: Device, sizes: TimedSizes, launches: list[BoundLaunch]) -> float:
    """The median over repeats of several replays each; the first repeat is not timed."""

    def enqueue() -> None:
        for launch in launches:
            device.launch_kernel(launch)

    graph, times = device.capture(enqueue), []
    for repeat in range(1 + sizes.graph_repeats):
        started = time.perf_counter()
        for _ in range(sizes.replays):
            device.launch(graph)
        device.synchronize()
        if repeat:
            times.append(1e6 * (time.perf_counter() - started) / sizes.replays)
    return statistics.median(times)


def prefill_of(shape: str, executor: CudaExecutor, sizes: TimedSizes, manifest: Manifest) -> Record:
    """A prompt of ``sizes.prefill`` tokens in steps of the engine's prefill_step."""
    size, rng = manifest.limits.prefill_step, np.random.default_rng(1)

    def run() -> None:
        for start in range(0, sizes.prefill, size):
            ids = rng.integers(101, manifest.model.vocab_size, (1, size))
            executor.run(CausalStep.chain(0, ids, np.array([start]), np.array([[size - 1]]), top_k=1))

    run()
    times = []
    for _ in range(sizes.graph_repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return {"what": f"{shape}: prefill of {sizes.prefill} tokens", "step": size, "ms": statistics.median(times)}
