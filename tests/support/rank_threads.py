"""The ranks of an engine as threads of one process, for tests that need no processes and no MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.patience import HANG_SECONDS
from trimode.engine.manifest import Manifest
from trimode.runtime.cpu.cpu_rank_executor import CpuRankExecutor
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep
from trimode.runtime.ranks.merging import merged

Add = Callable[[list[NDArray[np.float32]]], NDArray[np.float32]]


def in_order(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class ThreadGroup:
    """One rank's group. ``parts`` and ``barrier`` are shared by all."""

    def __init__(self, rank: int, parts: list[Any], barrier: threading.Barrier, add: Add) -> None:
        self.rank = rank
        self._parts, self._barrier, self._add = parts, barrier, add

    def total(self, partial: NDArray[np.float32]) -> NDArray[np.float32]:
        self._parts[self.rank] = partial
        self._barrier.wait(HANG_SECONDS)
        total = self._add(self._parts)
        self._barrier.wait(HANG_SECONDS)
        return total


class RankThreads:
    """All ranks of the engine directory ``engine``. add: how partial sums are added; a test may do it wrongly."""

    def __init__(self, engine: Path, add: Add = in_order) -> None:
        manifest = Manifest.read(engine)
        self.ranks = manifest.ranks
        self._top_k, self._tokens = manifest.limits.top_k, manifest.model.vocab_size // manifest.ranks
        self._barrier, parts = threading.Barrier(self.ranks), [None] * self.ranks
        groups = [ThreadGroup(rank, parts, self._barrier, add) for rank in range(self.ranks)]
        self.executors = [CpuRankExecutor(engine, manifest, group, 1, None) for group in groups]

    def acquire(self, sequences: int) -> None:
        for executor in self.executors:
            for _ in range(sequences):
                executor.pool.acquire()

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        def run(executor: CpuRankExecutor) -> Candidates:
            try:
                return executor.run(step)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as threads:
            parts = list(threads.map(run, self.executors))
        return merged(parts, min(step.top_k or self._top_k, self._top_k), self._tokens, step.asked_ids)
