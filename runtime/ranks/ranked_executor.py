"""The executor that stands for all ranks of an engine, in the process of the scheduler.

Every call of the executor and of its pool is sent to all ranks and answered by all, so their pools stay equal. A pass's
candidates are merged. The KV rows that the prefix cache keeps are those of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trimode.common.errors import TriModeError
from trimode.common.machine import usable_cpus
from trimode.engine.manifest import Manifest
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, ExecutorLostError
from trimode.runtime.kv.slots import Rows
from trimode.runtime.ranks.merging import merged
from trimode.runtime.ranks.messages import Answer, Call, Load, Loaded
from trimode.runtime.ranks.processes import RankProcesses
from trimode.runtime.target import HostLimits


class RankedExecutor:
    """Starts the ranks of an engine directory. Raises TriModeError if one cannot load its part, or takes too long.

    module: what each rank's process runs (:func:`trimode.runtime.ranks.rank_loop.follow`). limits: of all ranks
    together; each gets an equal share of the threads and of the memory. on_gpus: whether the passes run on GPUs.
    """

    def __init__(
        self, module: str, engine: Path, manifest: Manifest, limits: HostLimits, *, on_gpus: bool = False
    ) -> None:
        ranks = manifest.ranks
        self._top_k, self._tokens = manifest.limits.top_k, manifest.model.vocab_size // ranks
        threads = max(1, min(limits.threads or usable_cpus(), usable_cpus()) // ranks)
        self.threads = None if on_gpus else ranks * threads
        share = None if limits.kv_cache_bytes is None else limits.kv_cache_bytes // ranks
        self._processes = RankProcesses(module, ranks)
        try:
            loaded = self._processes.load(Load(engine.absolute(), ranks, threads, share))
        except ExecutorLostError as error:
            raise TriModeError(f"{engine} cannot be loaded: {error}") from None
        self.pool = RankedPool(self._processes, loaded)

    @property
    def pids(self) -> list[int]:
        """The ranks' process ids."""
        return self._processes.pids

    @property
    def failure(self) -> str | None:
        return self._processes.lost

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        parts = self.pool.call("run", step)
        return merged(parts, min(step.top_k or self._top_k, self._top_k), self._tokens, step.asked_ids)

    def close(self) -> None:
        self._processes.close()


class RankedPool:
    """The KV pools of all ranks as one. The smallest limit of a rank is the limit of all."""

    def __init__(self, processes: RankProcesses, loaded: Sequence[Loaded]) -> None:
        self.active = 0
        self.slots = 1
        self._processes = processes
        self._budgets = [of_rank.budget for of_rank in loaded]
        self.row_bytes = sum(of_rank.row_bytes for of_rank in loaded)
        limits = [of_rank.limit_bytes for of_rank in loaded if of_rank.limit_bytes is not None]
        self.limit_bytes = len(loaded) * min(limits) if limits else None

    def most_rows(self, sequences: int) -> int:
        return min(budget.most_rows(sequences) for budget in self._budgets)

    def acquire(self, rows: int | None = None) -> int:
        slot = self._same("acquire", self.most_rows(self.active + 1) if rows is None else rows)
        self.active += 1
        return slot

    def release(self, slot: int, rows: int | None = None) -> int:
        try:
            last = self._same("release", slot, rows)
        except ExecutorLostError:
            last = self.active - 1  # the memory is gone with the ranks
        self.active = last
        return last

    def reserve(self, rows: int) -> None:
        self.call("reserve", rows)

    def read_rows(self, slot: int, start: int, stop: int) -> Rows:
        """The KV heads of all ranks, in the order of ranks."""
        return np.concatenate(self.call("read_rows", slot, start, stop), axis=1)

    def move_rows(self, slot: int, start: int, sources: Sequence[int]) -> None:
        self.call("move_rows", slot, start, sources)

    def write_rows(self, slot: int, start: int, rows: Rows) -> None:
        of_ranks = np.split(rows, self._processes.ranks, axis=1)
        self._answers([Call("write_rows", (slot, start, part)) for part in of_ranks])

    def call(
        self, name: Literal["run", "acquire", "release", "reserve", "read_rows", "move_rows"], *arguments: Any
    ) -> list[Any]:
        """The results of all ranks. Raises what a rank raised, and ExecutorLostError if one has ended."""
        return self._answers([Call(name, arguments)] * self._processes.ranks)

    def _same(self, name: Literal["acquire", "release"], *arguments: Any) -> int:
        """The result, on which all ranks agree."""
        results: list[int] = self.call(name, *arguments)
        if any(result != results[0] for result in results):
            self._processes.close()
            raise ExecutorLostError(f"the ranks disagree on {name}: {results}")
        return results[0]

    def _answers(self, calls: Sequence[Call]) -> list[Any]:
        answers: list[Answer] = self._processes.exchange(calls)
        self.slots = min(answer.slots for answer in answers)
        failed = [answer.error for answer in answers if answer.error is not None]
        if failed and len(failed) < len(answers):
            self._processes.close()
            raise ExecutorLostError(f"{len(failed)} of {len(answers)} ranks failed: {failed[0]}")
        if failed:
            raise failed[0]
        return [answer.value for answer in answers]
