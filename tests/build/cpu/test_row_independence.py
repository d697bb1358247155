"""A row of the AR engine has the same bits in every step length, batch and pool size. So greedy self-speculation emits
exactly AR's tokens, near-ties included.

A separate kernel may compute the last row of an int4 product, and rounds differently. Steps of engines with int8
activations are padded to avoid it (trimode.runtime.cpu.even_rows). Engines with exact int4 products use it for steps of
one token.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.cpu_share import every_cpu
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
    with every_cpu():
        executor = CpuExecutor(engine, Manifest.read(engine), threads)
    for _ in ids:
        executor.pool.acquire()
    for begin in range(0, start, 250):
        part = ids[:, begin : min(begin + 250, start)]
        executor.run(CausalStep.chain(0, part, np.full(len(ids), begin), np.zeros((len(ids), 1), np.int64)))
    return executor


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["random_engine", "random_unpacked_engine", "random_int8_engine"])
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


def test_the_last_row_of_the_context_has_the_same_bits_too(random_int8_engine: Path) -> None:
    """A step of one token at the capacity is padded with a spare row of the pool."""
    capacity = Manifest.read(random_int8_engine).limits.capacity
    ids = np.random.default_rng(0).integers(101, 768, (1, capacity))
    executor = prefilled(random_int8_engine, ids, capacity - LENGTH)
    expected = rows_of(executor, ids, capacity - LENGTH, LONG_STEP)
    assert np.array_equal(rows_of(executor, ids, capacity - LENGTH, 1), expected)


def test_a_single_row_of_exact_int4_products_rounds_differently(random_int4_engine: Path) -> None:
    """If this fails, ONNX Runtime's kernel for one row rounds like the others: update the docstring of this module."""
    start = STARTS[0]
    ids = np.random.default_rng(0).integers(101, 768, (1, start + LENGTH))
    executor = prefilled(random_int4_engine, ids, start)
    expected = rows_of(executor, ids, start, LONG_STEP)
    assert np.array_equal(rows_of(executor, ids, start, 2), expected)
    single = rows_of(executor, ids, start, 1)
    assert not np.array_equal(single, expected)
    assert np.allclose(single[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)
