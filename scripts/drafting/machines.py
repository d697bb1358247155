"""Cost tables of machines: measured on this CPU, measured on an H100, estimated for others."""

from __future__ import annotations

import json
import statistics
import time
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path

import numpy as np

from scripts.drafting.cost_table import STEPS, CostTable
from scripts.gpu.cycle_estimate import LAUNCH_SECONDS
from trimode.build.roofline import (
    ADAPTER_RANK,
    CONFIG_8B,
    FORMATS,
    GPUS,
    TOP_K,
    PassShape,
    least_bytes,
    least_flops,
    pass_seconds,
    uniform_matrix_bytes,
)
from trimode.runtime.executor import BidirectionalStep, CausalStep, Executor
from trimode.runtime.loading import load_engine
from trimode.runtime.scheduling.pass_cost import EngineName

MEASUREMENTS = Path(__file__).resolve().parents[2] / "docs" / "measurements"
H100 = MEASUREMENTS / "2026-11-27-h100-check-7.json"
TRIALS = 15
CPU_BATCHES = (1, 2, 4, 8, 16)
WINDOW = 512  # KV rows of the GPUs' passes
LAUNCHES: dict[EngineName, int] = {"ar": 210, "diffusion": 244}  # of a pass of the 8B (docs/results-h100.md)


def of_this_cpu(engine: Path) -> CostTable:
    """The median of a few passes of each batch and step, on one thread."""
    executor = load_engine(engine, threads=1).executor
    return CostTable.of(
        f"this CPU, {engine.name}",
        f"measured, one thread, median of {TRIALS}",
        lambda name, batch, step: statistics.median(_trial(executor, name, batch, step) for _ in range(TRIALS)),
        CPU_BATCHES,
    )


def of_h100() -> CostTable:
    """The whole passes that docs/results-h100.md reports, at 512 KV rows."""
    found = json.loads(H100.read_text(encoding="utf-8"))["engines"]
    milliseconds: dict[tuple[str, int], float] = {}
    for entry in found:  # the first of each, with the tactics in use
        if entry["what"].startswith("8b: ") and entry.get("rows") == WINDOW and "ms" in entry:
            milliseconds.setdefault((entry["what"].removeprefix("8b: "), entry["batch"]), entry["ms"])
    one = {batch: milliseconds["ar pass", batch] for batch in (1, 4, 16)}
    sequence = (one[16] - one[1]) / 15 / 1e3  # seconds of each further sequence, of one token
    by_tokens: dict[EngineName, list[tuple[int, float]]] = {}
    passes: dict[EngineName, str] = {"ar": "verify", "diffusion": "draft"}
    for engine, what in passes.items():
        wide = {batch: milliseconds[what, batch] / 1e3 for batch in (1, 4, 16)}
        one_token = one[1] / 1e3 * (1 if engine == "ar" else wide[1] / (milliseconds["verify", 1] / 1e3))
        by_tokens[engine] = [
            (1, one_token),
            *((32 * batch, seconds - (batch - 1) * sequence) for batch, seconds in wide.items()),
        ]
    return _of_tokens("H100, 8B", "measured at 1, 4 and 16 sequences of 1 and 32 tokens", by_tokens, sequence)


def of_estimate(key: str) -> CostTable:
    """The 8B's passes on a GPU by roofline, w4a16, and the gaps before the launches: faster than any real pass."""
    gpu, matrices = GPUS[key], uniform_matrix_bytes(CONFIG_8B, FORMATS["w4a16"])
    ranks: dict[EngineName, int] = {"ar": 0, "diffusion": ADAPTER_RANK}

    def seconds(engine: EngineName, batch: int, step: int) -> float:
        shape = PassShape(batch, step, WINDOW, step, TOP_K, ranks[engine])
        least = pass_seconds(gpu, least_bytes(CONFIG_8B, shape, matrices), least_flops(CONFIG_8B, shape))
        return least + LAUNCHES[engine] * LAUNCH_SECONDS

    return CostTable.of(f"{gpu.name}, 8B", "estimated: roofline and gaps between launches", seconds)


def _of_tokens(
    name: str, source: str, by_tokens: dict[EngineName, list[tuple[int, float]]], sequence: float
) -> CostTable:
    """A table whose seconds depend on the tokens of the pass, linear between those given, and on the sequences."""

    def seconds(engine: EngineName, batch: int, step: int) -> float:
        points, tokens = by_tokens[engine], batch * step
        at = min(max(bisect_left([count for count, _ in points], tokens), 1), len(points) - 1)
        (first, low), (last, high) = list(pairwise(points))[at - 1]
        return low + (high - low) * (tokens - first) / (last - first) + (batch - 1) * sequence

    return CostTable.of(name, source, seconds)


def _trial(executor: Executor, engine: EngineName, batch: int, step: int) -> float:
    """Seconds of a pass over sequences of token 0."""
    pool = executor.pool
    try:
        while pool.active < batch:
            pool.acquire(STEPS[-1])
        ids, write = np.zeros((batch, step), np.int64), np.zeros(batch, np.int64)
        rows = np.tile(np.arange(step), (batch, 1))
        ready: CausalStep | BidirectionalStep = (
            CausalStep.chain(0, ids, write, rows, 1)
            if engine == "ar"
            else BidirectionalStep.block(0, ids, write, rows, np.full(batch, step), np.ones(batch, np.bool_), 1)
        )
        begun = time.perf_counter()
        executor.run(ready)
        return time.perf_counter() - begun
    finally:
        while pool.active:
            pool.release(pool.active - 1)
