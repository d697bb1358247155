"""Runs the passes of a scheduler step: plans which sequences share a pass, times it, and isolates failures.

A pass that raises is repeated with half of its sequences at a time, down to single ones, so that only the sequences
that fail alone are affected. Repeating is safe: a pass writes no KV row below its ``write_indices``, and sequences
change only when they absorb candidates.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from typing import TypeVar, get_args

import numpy as np

from trimode.runtime.decoding.acceptance_rates import LONGEST_BLOCK
from trimode.runtime.decoding.sequence import Pass
from trimode.runtime.executor import Candidates, Executor, PreparingExecutor, Speculated, SpeculatingExecutor
from trimode.runtime.scheduling.batching import (
    Member,
    Span,
    bidirectional_step,
    causal_step,
    chosen_among,
    plan_spans,
    span_of,
)
from trimode.runtime.scheduling.pass_cost import EngineName, PassCost

log = logging.getLogger(__name__)

MEASURING_SECONDS = 0.5
# For an executor that prepares passes, which takes about half of it. Common passes are then prepared.
PREPARING_SECONDS = 1.0

Found = TypeVar("Found")


class PassRunner:
    """clock: seconds, for what passes take."""

    def __init__(self, executor: Executor, cost: PassCost, clock: Callable[[], float] = time.perf_counter) -> None:
        self._executor = executor
        self._speculating = executor if isinstance(executor, SpeculatingExecutor) else None
        self._preparing = executor if isinstance(executor, PreparingExecutor) else None
        self._cost = cost
        self._clock = clock

    @property
    def speculates(self) -> bool:
        """Whether the executor can draft and verify in one call."""
        return self._speculating is not None

    def run(
        self, engine: EngineName, members: list[Member], committed: Callable[[], list[int]], most_rows: int
    ) -> Iterator[tuple[Member, Candidates | Exception]]:
        """Run one engine for all members; yields each with the candidates of its rows, or with why its pass failed.

        committed: returns the KV rows of every active slot, which change with what is yielded. most_rows: rows that a
        slot may have.
        """

        def run(span: Span) -> tuple[int, Candidates]:
            rows = committed()
            padded = self._padded(span, rows, most_rows)
            step = causal_step(padded, rows) if engine == "ar" else bidirectional_step(padded, rows)
            found, seconds = self._timed(lambda: self._executor.run(step))
            if seconds is not None:
                self._cost.observe(engine, padded.batch, span.step, seconds)
            return padded.first, found

        for span in plan_spans(members, committed(), most_rows, engine, self._cost):
            for part, result in _in_halves(run, span):
                for member in part.members:
                    if isinstance(result, Exception):
                        yield member, result
                    else:
                        first, found = result
                        yield member, found.of(member.slot - first, len(member.needed.rows))

    def speculate(
        self, members: list[Member], committed: Callable[[], list[int]], most_rows: int
    ) -> Iterator[tuple[Member, Speculated | Exception]]:
        """Draft and verify the members' whole blocks without waiting in between.

        Yields each with the candidates of its masked rows and of its verified rows, or with why its pass failed.
        """
        speculating = self._speculating
        if speculating is None:
            raise ValueError("this executor does not speculate")

        def run(span: Span) -> tuple[int, Speculated]:
            kv_rows = committed()
            padded = self._padded(span, kv_rows, most_rows)
            rows = np.tile(np.arange(padded.step), (padded.batch, 1))
            draft = dataclasses.replace(bidirectional_step(padded, kv_rows), logit_rows=rows)
            found, seconds = self._timed(lambda: speculating.speculate(draft, chosen_among(span)))
            if seconds is not None:
                self._observe_both(padded, seconds)
            return padded.first, found

        for span in plan_spans(members, committed(), most_rows, "diffusion", self._cost):
            for part, result in _in_halves(run, span):
                for member in part.members:
                    if isinstance(result, Exception):
                        yield member, result
                    else:
                        first, found = result
                        index, length = member.slot - first, len(member.needed.tokens)
                        drafted = found.drafted.of(index, length).behind_first_row()
                        yield member, Speculated(drafted, found.verified.of(index, length))

    def measure(self) -> None:
        """Fill the cost table by trial passes; the pool must have no active slot."""
        pool = self._executor.pool
        seconds = MEASURING_SECONDS if self._preparing is None else PREPARING_SECONDS
        self._cost.measure(self._trial_pass, seconds, lambda batch, step: pool.most_rows(batch) >= step, self._clock)

    def _timed(self, run: Callable[[], Found]) -> tuple[Found, float | None]:
        """What ``run`` returns, and its seconds; None if the executor also prepared a pass, which takes longer."""
        begun, preparations = self._clock(), self._preparations
        found = run()
        seconds = self._clock() - begun
        return found, seconds if self._preparations == preparations else None

    @property
    def _preparations(self) -> int:
        return 0 if self._preparing is None else self._preparing.preparations

    def _padded(self, span: Span, committed: Many[int], most_rows: int) -> Span:
        """The span over the slots that the executor prefers, if all of them have rows for the step."""
        if self._preparing is None:
            return span
        first, last = self._preparing.padded_slots(span.first, span.last, span.step)
        if max(committed[first : last + 1]) + span.step > most_rows:
            return span
        return span._replace(first=first, last=last)

    def _observe_both(self, span: Span, seconds: float) -> None:
        """Split the seconds of a draft and its verification as the cost table does."""
        shares = {engine: self._cost.seconds(engine, span.batch, span.step) for engine in get_args(EngineName)}
        for engine, share in shares.items():
            self._cost.observe(engine, span.batch, span.step, seconds * share / sum(shares.values()))

    def _trial_pass(self, engine: EngineName, batch: int, step: int) -> float:
        """Seconds of a pass over sequences of token 0. A step that is longer than all blocks has one logit row, like a
        prefill.
        """
        pool = self._executor.pool
        rows = np.arange(step) if step <= LONGEST_BLOCK else np.array([step - 1])
        idle = Pass("commit" if engine == "ar" else "draft", np.zeros(step, np.int64), rows)
        try:
            while pool.active < batch:
                pool.acquire(step)
            pool.reserve(step)
            members = [Member(slot, idle, adapter=True, candidates=1, draft_candidates=1) for slot in range(batch)]
            span, committed = Span(0, batch - 1, step, members), [0] * batch
            ready = causal_step(span, committed) if engine == "ar" else bidirectional_step(span, committed)
            begun = self._clock()
            self._executor.run(ready)
            return self._clock() - begun
        finally:
            while pool.active:
                pool.release(pool.active - 1)


def _in_halves(run: Callable[[Span], Found], span: Span) -> Iterator[tuple[Span, Found | Exception]]:
    """The span's result; if it fails, those of its halves. Yields each part with its result or its error."""
    try:
        found = run(span)
    except Exception as error:  # an executor may raise anything
        if len(span.members) == 1:
            yield span, error
            return
        log.warning("a pass of %d requests failed, running it again in halves: %r", len(span.members), error)
        middle = len(span.members) // 2
        for half in (span.members[:middle], span.members[middle:]):
            yield from _in_halves(run, span_of(half))
    else:
        yield span, found
