"""Kept bindings: a pass uses the memory of its own shape and the caches of its own slots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trimode.engine.manifest import Manifest
from trimode.runtime.cpu import cpu_executor
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import CausalStep, Ints

PARTS = [(0, 8), (8, 12), (12, 20), (20, 24)]  # of a text; two shapes, in turn


def logits(executor: CpuExecutor, slot: int, ids: Ints, start: int) -> np.ndarray:
    """Of the last of the tokens, which come at ``start`` of a slot."""
    last = np.array([[ids.shape[1] - 1]])
    return executor.run(CausalStep.chain(slot, ids, np.array([start]), last)).logits


@pytest.mark.parametrize(("shapes", "bindings"), [(256, 1024), (1, 1024), (256, 1)])
def test_texts_of_several_slots_are_those_of_one(
    random_engine: Path, monkeypatch: pytest.MonkeyPatch, shapes: int, bindings: int
) -> None:
    monkeypatch.setattr(cpu_executor, "_MOST_SHAPES", shapes)
    monkeypatch.setattr(cpu_executor, "_MOST_BINDINGS", bindings)
    ids = np.random.default_rng(0).integers(101, 768, (3, 1, 24))
    expected = []
    for text in ids:
        alone = CpuExecutor(random_engine, Manifest.read(random_engine), threads=1)
        alone.pool.acquire()
        expected.append([logits(alone, 0, text[:, begin:end], begin) for begin, end in PARTS])
    together = CpuExecutor(random_engine, Manifest.read(random_engine), threads=1)
    for _ in ids:
        together.pool.acquire()
    for part, (begin, end) in enumerate(PARTS):
        for slot, text in enumerate(ids):
            assert np.array_equal(logits(together, slot, text[:, begin:end], begin), expected[slot][part])
