"""Continuous batching: each step admits, drafts, commits and delivers.

A step makes at most one round of bidirectional passes and one of causal passes over all running sequences, whatever
their modes. A self-speculating sequence drafts and commits in one step; a diffusion sequence denoises in several and
then commits; prefills go along with the commits, a chunk a step. Requests join and leave between steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from dataclasses import dataclass
from typing import get_args

import numpy as np

from trimode.runtime.decoding.acceptance import LONGEST_BLOCK
from trimode.runtime.decoding.sequence import Pass
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Executor, SpeculatingExecutor
from trimode.runtime.kv.prefix_cache import PrefixCache
from trimode.runtime.request.outputs import Counts
from trimode.runtime.scheduling.auto_block import choose_block_length
from trimode.runtime.scheduling.batching import Member, Span, bidirectional_step, causal_step, plan_spans
from trimode.runtime.scheduling.pass_cost import EngineName, PassCost
from trimode.runtime.scheduling.running_request import Request

MEASURING_SECONDS = 0.5


@dataclass(frozen=True)
class Stats:
    """The scheduler's state, and sums over the answers finished so far. slots: KV slots allocated."""

    running: int
    waiting: int
    slots: int
    steps: int
    finished: int
    emitted: int
    counts: Counts
    prefix_cache_bytes: int


class Scheduler:
    """Runs requests on one executor; all calls come from one thread.

    max_batch: sequences that run at once. capacity: tokens of the longest. prefill_tokens: prompt tokens that a step
    takes in, beyond the first chunk.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        max_batch: int,
        capacity: int,
        prefill_tokens: int,
        cost: PassCost,
        prefix_cache: PrefixCache | None,
    ) -> None:
        self.waiting: deque[Request] = deque()
        self._executor = executor
        self._speculating = executor if isinstance(executor, SpeculatingExecutor) else None
        self._running: list[Request] = []  # by slot
        self._max_batch = max_batch
        self._capacity = capacity
        self._prefill_tokens = prefill_tokens
        self._cost = cost
        self._prefix_cache = prefix_cache
        self._steps = 0
        self._finished = 0
        self._emitted = 0
        self._counts = Counts()

    @property
    def busy(self) -> bool:
        return bool(self._running or self.waiting)

    def stats(self) -> Stats:
        return Stats(
            running=len(self._running),
            waiting=len(self.waiting),
            slots=self._executor.pool.slots,
            steps=self._steps,
            finished=self._finished,
            emitted=self._emitted,
            counts=self._counts,
            prefix_cache_bytes=0 if self._prefix_cache is None else self._prefix_cache.bytes,
        )

    def step(self) -> None:
        """One cycle of every running sequence."""
        self._steps += 1
        self._drop_aborted()
        self._admit()
        self._open_blocks()
        if not self._speculate():
            self._run_passes("diffusion")
            self._run_passes("ar")
        self._deliver()

    def measure_passes(self) -> None:
        """Learn what passes cost, before anything runs, for requests that ask for ``auto``."""
        self._cost.measure(self._trial_pass, MEASURING_SECONDS, self._executor.pool.holds)

    def fail(self, error: Exception) -> None:
        """Tell every request that the engine failed, and forget them and their rows."""
        for request in [*self._running, *self.waiting]:
            for answer in (request, *request.siblings):
                answer.fail(error)
        self.waiting.clear()
        while self._running:
            self._free(len(self._running) - 1)

    def _drop_aborted(self) -> None:
        if any(request.aborted for request in self.waiting):
            for request in [request for request in self.waiting if request.aborted]:
                self.waiting.remove(request)
                self._cancel(request)
        for slot in range(len(self._running) - 1, -1, -1):
            if self._running[slot].aborted:
                request = self._running[slot]
                self._release(slot)
                self._cancel(request)

    def _cancel(self, request: Request) -> None:
        for answer in (request, *request.siblings):
            answer.cancel()

    def _admit(self) -> None:
        """First come, first served, while there are slots and the KV pool may hold them."""
        while self.waiting and len(self._running) < self._max_batch:
            request = self.waiting[0]
            longest = max(other.longest for other in (request, *self._running))
            if self._running and not self._executor.pool.holds(len(self._running) + 1, longest):
                return
            slot = self._executor.pool.acquire()
            self._running.append(self.waiting.popleft())
            request.admit()
            if self._prefix_cache is not None:
                sequence = request.sequence
                sequence.committed = self._prefix_cache.restore(sequence.prompt, self._executor.pool, slot)
                sequence.counts.cached_tokens = sequence.committed

    def _open_blocks(self) -> None:
        opening = [request.sequence for request in self._running if request.sequence.needs_block]
        deciding = [sequence for sequence in opening if sequence.params.mode == "auto"]
        if deciding:
            others = [
                request.sequence
                for request in self._running
                if request.sequence.params.mode != "auto" and not request.sequence.prefilling
            ]
            chosen = choose_block_length(deciding, others, self._cost)
            if chosen == 1:
                for sequence in deciding:
                    sequence.acceptance.forget()
        for sequence in opening:
            longest = sequence.longest_block
            sequence.open_block(min(chosen, longest) if sequence.params.mode == "auto" else longest)

    def _run_passes(self, engine: EngineName) -> None:
        members = self._members(engine)
        if not members:
            return
        committed = [request.sequence.committed for request in self._running]
        for span in plan_spans(members, committed, self._capacity, engine, self._cost):
            begun = time.perf_counter()
            found = self._executor.run(_step(engine, span, committed))
            self._cost.observe(engine, span.batch, span.step, time.perf_counter() - begun)
            for slot, needed, _, _ in span.members:
                self._absorb(slot, needed, found.of(slot - span.first, len(needed.rows)))

    def _speculate(self) -> bool:
        """Draft and commit with one wait, if the executor can and that is what every sequence is about to do; returns
        whether it was done.
        """
        if self._speculating is None:
            return False
        members = self._members("diffusion")
        if not members or len(members) < len(self._running):
            return False
        if any(self._running[member.slot].sequence.drafts_in_passes for member in members):
            return False
        committed = [request.sequence.committed for request in self._running]
        for span in plan_spans(members, committed, self._capacity, "diffusion", self._cost):
            rows = np.tile(np.arange(span.step), (span.batch, 1))
            draft = dataclasses.replace(bidirectional_step(span, committed), logit_rows=rows)
            begun = time.perf_counter()
            drafted, verified = self._speculating.speculate(draft)
            self._observe_both(span, time.perf_counter() - begun)
            for slot, needed, _, _ in span.members:
                index, length = slot - span.first, len(needed.tokens)
                logits, tokens, log_sum_exp = drafted.of(index, length)
                self._absorb(slot, needed, Candidates(logits[1:], tokens[1:], log_sum_exp[1:]))
                self._absorb(slot, self._running[slot].sequence.next_pass(), verified.of(index, length))
        return True

    def _observe_both(self, span: Span, seconds: float) -> None:
        """A draft and its verification took so long together: by their shares so far."""
        shares = {engine: self._cost.seconds(engine, span.batch, span.step) for engine in get_args(EngineName)}
        for engine, share in shares.items():
            self._cost.observe(engine, span.batch, span.step, seconds * share / sum(shares.values()))

    def _members(self, engine: EngineName) -> list[Member]:
        """The sequences that need a pass of this engine now, by slot."""
        members: list[Member] = []
        prefill = 0
        for slot, request in enumerate(self._running):
            sequence = request.sequence
            if sequence.ending.finish_reason is not None:  # a denoise pass found its end
                continue
            if sequence.fills_block != (engine == "diffusion"):
                continue
            needed = sequence.next_pass()
            if needed.kind == "prefill":
                # The first chunk always goes; more of them only as far as those who decode need not wait for long.
                if prefill and prefill + len(needed.tokens) > self._prefill_tokens:
                    continue
                prefill += len(needed.tokens)
            candidates = 1 if needed.kind == "draft" else sequence.params.candidates
            members.append(Member(slot, needed, sequence.params.uses_adapter, candidates))
        return members

    def _absorb(self, slot: int, needed: Pass, found: Candidates) -> None:
        request = self._running[slot]
        sequence = request.sequence
        sequence.absorb(needed, found)
        if needed.kind == "prefill" and not sequence.prefilling:
            if self._prefix_cache is not None:
                self._prefix_cache.store(sequence.prompt, self._executor.pool, slot)
            self.waiting.extendleft(reversed(request.siblings))
            request.siblings = []

    def _deliver(self) -> None:
        for slot in range(len(self._running) - 1, -1, -1):
            request = self._running[slot]
            if request.sequence.ending.finish_reason is not None:
                self._count(request)
                self._release(slot)
            request.deliver()

    def _count(self, request: Request) -> None:
        self._finished += 1
        self._emitted += len(request.sequence.emitted)
        self._counts.add(request.sequence.counts)

    def _release(self, slot: int) -> None:
        """Free a slot, keeping its rows for others to reuse."""
        sequence = self._running[slot].sequence
        if self._prefix_cache is not None:
            known = np.array(sequence.tokens[: sequence.committed], np.int64)
            self._prefix_cache.store(known, self._executor.pool, slot)
        self._free(slot)

    def _free(self, slot: int) -> None:
        """The last sequence moves into the slot."""
        self._executor.pool.release(slot)
        last = self._running.pop()
        if slot < len(self._running):
            self._running[slot] = last

    def _trial_pass(self, engine: EngineName, batch: int, step: int) -> float:
        """Seconds of a pass of nobody's tokens."""
        pool = self._executor.pool
        idle = Pass(
            "commit" if engine == "ar" else "draft", np.zeros(step, np.int64), np.arange(min(step, LONGEST_BLOCK))
        )
        try:
            while pool.active < batch:
                pool.acquire()
            pool.reserve(step)
            members = [Member(slot, idle, adapter=True, candidates=1) for slot in range(batch)]
            ready = _step(engine, Span(0, batch - 1, step, members), [0] * batch)
            begun = time.perf_counter()
            self._executor.run(ready)
            return time.perf_counter() - begun
        finally:
            while pool.active:
                pool.release(pool.active - 1)


def _step(engine: EngineName, span: Span, committed: list[int]) -> CausalStep | BidirectionalStep:
    return causal_step(span, committed) if engine == "ar" else bidirectional_step(span, committed)
