"""Continuous batching: each step admits requests, drafts, commits and delivers.

A step runs at most one round of bidirectional passes and one round of causal passes over all running sequences,
whatever their modes. A self-speculating sequence drafts and commits in one step; a diffusion sequence denoises over
several steps and then commits; prefills run beside the commits, one chunk for each step. Requests join and leave
between steps.

An exception in a request's own code (sampling, text, listener) or in a pass that fails for it alone ends that request;
the others continue.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from trimode.runtime.decoding.sequence import Pass, Sequence
from trimode.runtime.executor import Candidates, Executor, Ints
from trimode.runtime.kv.prefix_cache import PrefixCache
from trimode.runtime.request.outputs import Choice, Counts
from trimode.runtime.scheduling.auto_block import BlockChooser, Opening, Plan
from trimode.runtime.scheduling.batching import Member
from trimode.runtime.scheduling.drafting_stats import DraftingCounts, DraftingStats
from trimode.runtime.scheduling.pass_cost import EngineName, PassCost
from trimode.runtime.scheduling.pass_runner import PassRunner
from trimode.runtime.scheduling.prefill_budget import PrefillBudget
from trimode.runtime.scheduling.running_request import Request

log = logging.getLogger(__name__)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Stats:
    """A snapshot of the scheduler, and sums over the answers finished so far.

    running, waiting: answers. slots: allocated KV slots. steps: scheduler steps. finished: answers. failed: answers
    that ended with an error. emitted: tokens of finished answers. counts: their passes and drafts. drafting: how they
    drafted, and what ``auto`` chose.
    """

    running: int
    waiting: int
    slots: int
    steps: int
    finished: int
    failed: int
    emitted: int
    counts: Counts
    prefix_cache_bytes: int
    drafting: DraftingStats


@dataclass(frozen=True)
class _Totals:
    """Sums over finished answers. Replaced as a whole, so that other threads read a consistent state."""

    finished: int = 0
    failed: int = 0
    emitted: int = 0
    counts: Counts = field(default_factory=Counts)


class Scheduler:
    """Runs requests on one executor. All calls come from one thread, except for :meth:`stats`.

    max_batch: the most sequences that run at once. context: the most KV rows of a sequence. prefill_tokens: as of
    :class:`~trimode.runtime.scheduling.prefill_budget.PrefillBudget`. clock: seconds, for what passes take.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        max_batch: int,
        context: int,
        prefill_tokens: int,
        cost: PassCost,
        prefix_cache: PrefixCache | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.waiting: deque[Request] = deque()
        self._pool = executor.pool
        self._passes = PassRunner(executor, cost, clock)
        self._running: list[Request] = []  # by slot
        self._max_batch = max_batch
        self._context = context
        self._prefill_tokens = prefill_tokens
        self._cost = cost
        # A tree needs the host between draft and commit, which an executor that speculates does without.
        self._block_chooser = BlockChooser(cost, trees=not self._passes.speculates)
        self._drafting = DraftingCounts()
        self._prefix_cache = prefix_cache
        self._steps = 0
        self._totals = _Totals()

    @property
    def busy(self) -> bool:
        return bool(self._running or self.waiting)

    def stats(self) -> Stats:
        """Callable from any thread."""
        totals = self._totals
        return Stats(
            running=len(self._running),
            waiting=len(self.waiting),
            slots=self._pool.slots,
            steps=self._steps,
            finished=totals.finished,
            failed=totals.failed,
            emitted=totals.emitted,
            counts=totals.counts,
            prefix_cache_bytes=0 if self._prefix_cache is None else self._prefix_cache.bytes,
            drafting=DraftingStats(
                self._drafting.cycles(),
                self._drafting.choices(),
                self._block_chooser.expectations(),
                self._cost.observed,
            ),
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
            if any(request.sequence.runs_again for request in self._active()):
                self._run_passes("ar", again=True)
        self._deliver()

    def measure_passes(self) -> None:
        """Measure what passes cost, before any request runs."""
        self._passes.measure()

    def fail_all(self, error: Exception) -> None:
        """End every request with ``error``."""
        requests = [*self._running, *self.waiting]
        self._running.clear()
        self.waiting.clear()
        try:
            while self._pool.active:
                self._pool.release(self._pool.active - 1)
        finally:
            for request in requests:
                self._end_with(request, error)

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
            try:
                answer.cancel()
            except Exception as error:
                answer.failure = error
                self._fail(answer)

    def _admit(self) -> None:
        """Admit requests in order of arrival, while there are slots and the KV budget allows it."""
        while self.waiting and len(self._running) < self._max_batch:
            request = self.waiting[0]
            rows = max(other.sequence.kv_rows for other in (request, *self._running))
            if self._running and self._pool.most_rows(len(self._running) + 1) < rows:
                return
            try:
                slot = self._pool.acquire(rows)
            except Exception as error:
                request.failure = error
                self.waiting.popleft()
                self._fail(request)
                continue
            self._running.append(self.waiting.popleft())
            try:
                request.admit()
                sequence = request.sequence
                if self._prefix_cache is not None and sequence.prompt_logprobs is None:
                    sequence.committed = self._prefix_cache.restore(sequence.prompt, self._pool, slot)
                    sequence.counts.cached_tokens = sequence.committed
            except Exception as error:
                request.failure = error

    def _open_blocks(self) -> None:
        """Begin a block wherever the last one is finished: choose its length in mode ``auto``, and whether its drafts
        are copies.
        """
        opening = [request for request in self._active() if request.sequence.needs_block]
        chosen = self._choose(opening)
        for request in opening:
            try:
                longest = request.sequence.longest_block
                length, looked_up, tree = chosen.get(request, (longest, False, False))
                request.sequence.open_block(min(length, longest), looked_up, tree)
            except Exception as error:
                request.failure = error

    def _choose(self, opening: list[Request]) -> dict[Request, tuple[int, bool, bool]]:
        """The block length, whether the drafts are copies, and whether they form a tree, of the requests that leave it
        open.
        """
        copy_yields: dict[Request, list[float]] = {}
        for request in opening:
            sequence = request.sequence
            if sequence.replaying:
                continue
            try:
                yields = sequence.look_up()
                if yields or sequence.params.mode == "auto":
                    copy_yields[request] = yields
            except Exception as error:
                request.failure = error
        if not copy_yields:
            return {}
        plan = None if any(copy_yields.values()) else self._block_chooser.kept(len(self._running))
        if plan is None:
            plan, chosen = self._choose_anew(copy_yields)
        else:
            chosen = dict.fromkeys(copy_yields, (plan.block, False, plan.tree))
        for request, (length, _, _) in chosen.items():
            if request.sequence.params.record_drafts:
                rates = {block: found.rate for block, found in self._block_chooser.expectations().items()}
                request.sequence.choice = Choice(length, plan.trial, rates)
        if chosen:
            self._drafting.count_choice(plan)
        return chosen

    def _choose_anew(
        self, copy_yields: dict[Request, list[float]]
    ) -> tuple[Plan, dict[Request, tuple[int, bool, bool]]]:
        """A new plan for these requests, and what it means for each. Acceptance that it does not test is forgotten."""
        joining, others = list[Opening](), list[Sequence]()
        for request in self._active():
            sequence = request.sequence
            if request not in copy_yields and sequence.params.mode != "auto":
                others.append(sequence)
            elif sequence.prefilling:
                joining.append(Opening(sequence, []))
        choices = {request: Opening(request.sequence, yields) for request, yields in copy_yields.items()}
        prefilling = any(request.sequence.prefilling for request in self._running)
        plan = self._block_chooser.choose([*choices.values(), *joining], others, prefilling)
        chosen: dict[Request, tuple[int, bool, bool]] = {}
        for (request, each), copies in zip(choices.items(), plan.copying, strict=False):  # not those that are joining
            if each.decides:
                if copies or plan.block == 1:
                    each.sequence.acceptance.forget(plan.cycles)
                elif not plan.tree:
                    each.sequence.acceptance.forget_trees(plan.cycles)
            if copies:
                chosen[request] = plan.copy_block, True, False
            elif each.decides:
                chosen[request] = plan.block, False, plan.tree
        return plan, chosen

    def _run_passes(self, engine: EngineName, again: bool = False) -> None:
        """again: only for the sequences that must repeat their pass, which are then complete."""
        members = self._members(engine, again)
        if not members:
            return
        for member, found in self._passes.run(engine, members, self._committed, self._most_rows()):
            request = self._running[member.slot]
            try:
                self._absorb(member.slot, member.needed, _candidates(found))
            except Exception as error:
                request.failure = error

    def _speculate(self) -> bool:
        """Draft and commit in one call, if the executor can and if every running sequence is about to do both."""
        if not self._passes.speculates:
            return False
        members = self._members("diffusion")
        if not members or len(members) < len(self._running):
            return False
        if any(self._sequence(member).drafts_on_host for member in members):
            return False
        for member, found in self._passes.speculate(members, self._committed, self._most_rows()):
            request = self._running[member.slot]
            try:
                drafted, verified = _candidates(found)
                self._absorb(member.slot, member.needed, drafted)
                self._absorb(member.slot, request.sequence.next_pass(), verified)
            except Exception as error:
                request.failure = error
        return True

    def _sequence(self, member: Member) -> Sequence:
        return self._running[member.slot].sequence

    def _active(self) -> list[Request]:
        return [request for request in self._running if request.failure is None]

    def _committed(self) -> list[int]:
        return [request.sequence.committed for request in self._running]

    def _most_rows(self) -> int:
        return min(self._context, self._pool.most_rows(len(self._running)))

    def _members(self, engine: EngineName, again: bool = False) -> list[Member]:
        """The sequences that need a pass of this engine now, by slot. again: only those that must repeat their pass."""
        members: list[Member] = []
        prefill = PrefillBudget(self._prefill_tokens, self._cost)
        for slot, request in enumerate(self._running):
            sequence = request.sequence
            # A denoise pass may have found the end of the text.
            if request.failure is not None or sequence.ending.finish_reason is not None:
                continue
            if sequence.fills_block != (engine == "diffusion") or (again and not sequence.runs_again):
                continue
            try:
                needed = sequence.next_pass()
                if needed.kind == "prefill" and not prefill.admits(len(needed.tokens)):
                    continue
                members.append(
                    Member(slot, needed, sequence.params.uses_adapter, sequence.candidates, sequence.draft_candidates)
                )
            except Exception as error:
                request.failure = error
        return members

    def _absorb(self, slot: int, needed: Pass, found: Candidates) -> None:
        request = self._running[slot]
        sequence = request.sequence
        sequence.absorb(needed, found)
        if sequence.moves is not None:
            self._pool.move_rows(slot, *sequence.moves)
        if needed.kind == "prefill" and not sequence.prefilling:
            self._keep_rows(request, sequence.prompt, slot)
            self.waiting.extendleft(reversed(request.siblings))
            request.siblings = []

    def _deliver(self) -> None:
        """Send updates; free the slots of finished and failed requests."""
        for slot in range(len(self._running) - 1, -1, -1):
            request = self._running[slot]
            finished = request.failure is None and request.sequence.ending.finish_reason is not None
            if finished:
                self._count(request)
                self._release(slot)
            if request.failure is None:
                try:
                    request.deliver()
                except Exception as error:
                    request.failure = error
            if request.failure is not None:
                if not finished:
                    self._free(slot)
                self._fail(request)

    def _count(self, request: Request) -> None:
        totals, sequence = self._totals, request.sequence
        self._totals = _Totals(
            finished=totals.finished + 1,
            failed=totals.failed,
            emitted=totals.emitted + len(sequence.emitted),
            counts=totals.counts + sequence.counts,
        )
        self._drafting.count_cycles(sequence.params.mode, sequence.cycles)

    def _fail(self, request: Request) -> None:
        """Report the failure of a request that has no slot any more."""
        error = request.failure
        if error is None:
            raise ValueError("the request has not failed")
        log.error("request %d failed: %r", request.request_id, error, exc_info=error)
        self._end_with(request, error)

    def _end_with(self, request: Request, error: Exception) -> None:
        answers = (request, *request.siblings)
        totals = self._totals
        self._totals = _Totals(totals.finished, totals.failed + len(answers), totals.emitted, totals.counts)
        for answer in answers:
            try:
                answer.fail(error)
            except Exception:  # the listener itself may be what failed
                log.exception("request %d: its error could not be delivered", request.request_id)

    def _release(self, slot: int) -> None:
        """Free a slot and keep its rows for prompts that begin with the same text."""
        sequence = self._running[slot].sequence
        self._keep_rows(self._running[slot], np.array(sequence.tokens[: sequence.committed], np.int64), slot)
        self._free(slot)

    def _keep_rows(self, request: Request, tokens: Ints, slot: int) -> None:
        """Store a slot's first rows in the prefix cache. An error costs the reuse, not the answer."""
        if self._prefix_cache is None:
            return
        try:
            self._prefix_cache.store(tokens, self._pool, slot)
        except Exception:
            log.exception("request %d: its KV rows could not be kept for reuse", request.request_id)

    def _free(self, slot: int) -> None:
        """The last sequence moves into the slot."""
        committed = self._committed()
        del committed[slot]
        self._pool.release(slot, max(committed, default=0))
        last = self._running.pop()
        if slot < len(self._running):
            self._running[slot] = last


def _candidates(found: Found | Exception) -> Found:
    """The candidates of a pass; raises the exception of a failed one."""
    if isinstance(found, Exception):
        raise found
    return found
