"""A row of the AR engine is the same to the bit, however long its step, whatever else is in the batch, however large
the pool: so greedy self-speculation emits AR's tokens, near-ties included.

It holds for matrices that are not int4. An int4 product of one row has a kernel of its own, which rounds otherwise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trimode.engine.manifest import Manifest
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import CausalStep, Ints

# Across steps of the query scale, at 512 and 3584.
STARTS, LENGTH, LONG_STEP = (500, 3570), 32, 16


def rows_of(executor: CpuExecutor, ids: Ints, start: int, step: int) -> np.ndarray:
    """Best logits of the first sequence's rows, [LENGTH, k], by causal passes of ``step`` tokens over ``ids``."""
    batch, rows = len(ids), []
    for begin in range(start, start + LENGTH, step):
        part = ids[:, begin : begin + step]
        every = np.tile(np.arange(part.shape[1]), (batch, 1))
        found = executor.run(CausalStep.chain(0, part, np.full(batch, begin), every))
        rows.append(np.concatenate((found.logits[0], found.tokens[0]), axis=1))
    return np.concatenate(rows)


def prefilled(engine: Path, ids: Ints, start: int, threads: int | None = None) -> CpuExecutor:
    executor = CpuExecutor(engine, Manifest.read(engine), threads)
    for _ in ids:
        executor.pool.acquire()
    for begin in range(0, start, 250):
        part = ids[:, begin : min(begin + 250, start)]
        executor.run(CausalStep.chain(0, part, np.full(len(ids), begin), np.zeros((len(ids), 1), np.int64)))
    return executor


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["random_engine", "random_unpacked_engine"])
def test_rows_are_the_same_in_every_step_batch_and_pool(name: str, start: int, request: pytest.FixtureRequest) -> None:
    engine: Path = request.getfixturevalue(name)
    ids = np.random.default_rng(0).integers(101, 768, (3, start + LENGTH))
    alone = prefilled(engine, ids[:1], start)
    expected = rows_of(alone, ids[:1], start, LONG_STEP)
    for step in (1, 2, 7, LENGTH):
        assert np.array_equal(rows_of(alone, ids[:1], start, step), expected), step
    alone.pool.reserve(4096)
    assert np.array_equal(rows_of(alone, ids[:1], start, LONG_STEP), expected)
    assert np.array_equal(rows_of(prefilled(engine, ids[:1], start, threads=1), ids[:1], start, 1), expected)
    together = prefilled(engine, ids, start)
    for step in (1, LONG_STEP):
        assert np.array_equal(rows_of(together, ids, start, step), expected), step


def test_a_single_row_of_int4_products_is_rounded_otherwise(random_int4_engine: Path) -> None:
    """If this fails, the kernels have become as good as the others: say so above, and drop it."""
    start = STARTS[0]
    ids = np.random.default_rng(0).integers(101, 768, (1, start + LENGTH))
    executor = prefilled(random_int4_engine, ids, start)
    expected = rows_of(executor, ids, start, LONG_STEP)
    assert np.array_equal(rows_of(executor, ids, start, 2), expected)
    single = rows_of(executor, ids, start, 1)
    assert not np.array_equal(single, expected)
    assert np.allclose(single[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)
