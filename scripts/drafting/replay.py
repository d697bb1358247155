"""Replay recorded texts through the real scheduler, with the seconds of a cost table in place of an engine's.

The scheduler, its sequences and the choices of ``auto`` are the runtime's own. Only the passes are replaced: they
return recorded candidates and advance a virtual clock. The host's time is the constants of ``auto``, for each pass, so
that a replay can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scripts.drafting.cost_table import CostTable
from scripts.drafting.recording import BLOCKS, MAX_TOKENS, Text
from tests.support.exact_law import NoText
from trimode import SamplingParams
from trimode.runtime.decoding.acceptance_rates import LONGEST_BLOCK, Acceptance, SharedAcceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.lookup import Lookup, SharedLookupAcceptance
from trimode.runtime.decoding.sequence import TREE_RANKS, Pass
from trimode.runtime.decoding.sequence import Sequence as Answer
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep
from trimode.runtime.kv.host_kv_pool import KvPool
from trimode.runtime.request.outputs import Cycle, Update
from trimode.runtime.scheduling.auto_block import HOST_SECONDS, HOST_SECONDS_OF_A_SEQUENCE, seconds_of_a_tree
from trimode.runtime.scheduling.pass_cost import PassCost
from trimode.runtime.scheduling.running_request import Request
from trimode.runtime.scheduling.scheduler import Scheduler

CAPACITY = 2048
MASK = -1  # no recorded text has it
WRONG = -2


class VirtualClock:
    """Seconds of all passes, and of the host outside them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class ReplayingExecutor:
    """Every KV row holds the number of its slot's text, which so moves with the slot."""

    threads = None

    def __init__(self, texts: Sequence[Text], table: CostTable, clock: VirtualClock) -> None:
        self.pool = KvPool(layers=1, kv_heads=1, head_dim=1, capacity=CAPACITY)
        self._texts = [np.concatenate([text.prompt, text.answer, np.full(LONGEST_BLOCK, WRONG)]) for text in texts]
        self._recorded = texts
        self._by_prompt = {tuple(text.prompt.tolist()): number for number, text in enumerate(texts)}
        self._table = table
        self._clock = clock

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        self.pool.reserve(step.rows_written)
        numbers = self.pool.buffers[0][:, 0, :, 0]
        batch, rows = step.logit_rows.shape
        causal = isinstance(step, CausalStep)
        ranks = 1 if causal else step.top_k or TREE_RANKS
        tokens = np.full((batch, rows, ranks), WRONG, np.int64)
        logits = np.zeros((batch, rows, ranks), np.float32)
        for index in range(batch):
            slot, write = step.first_slot + index, int(step.write_indices[index])
            if write == 0:
                length = int(step.logit_rows[index, 0]) + 1
                number = self._by_prompt.get(tuple(step.input_ids[index, :length].tolist()))
                if number is None:  # padding
                    continue
            else:
                number = int(numbers[slot, 0])
            numbers[slot, write : write + step.input_ids.shape[1]] = number
            if isinstance(step, CausalStep):
                positions = step.position_ids[index, step.logit_rows[index]]
                text = self._texts[number]
                tokens[index, :, 0] = text[np.minimum(positions + 1, len(text) - 1)]
            else:
                self._draft(number, step, index, tokens[index], logits[index])
        engine = "ar" if causal else "diffusion"
        self._clock.seconds += HOST_SECONDS + HOST_SECONDS_OF_A_SEQUENCE * batch
        self._clock.seconds += self._table.seconds(engine, batch, step.input_ids.shape[1])
        return Candidates(logits, tokens, np.zeros((batch, rows), np.float32))

    def _draft(self, number: int, step: BidirectionalStep, index: int, tokens: Any, logits: Any) -> None:
        text, length = self._recorded[number], int(step.step_lengths[index])
        place = int(step.write_indices[index]) - len(text.prompt)
        block = next(block for block in BLOCKS if block >= min(length, BLOCKS[-1]))
        drafts, ranks = text.drafts[block], tokens.shape[1]
        if length < 2 or not 0 <= place < len(text.answer):
            return
        places = np.minimum(step.logit_rows[index], block - 1) - 1
        if ranks > 1:
            self._clock.seconds += seconds_of_a_tree(length)
        tokens[:] = drafts.tokens[place, places, :ranks]
        logits[:] = drafts.log_probs[place, places, :ranks]


class ConfidentAnswer(Answer):
    """An answer whose commits verify a draft only as far as the product of its probabilities is at least ``least``."""

    least = 0.0

    def _draft(self, done: Pass, found: Candidates) -> None:
        super()._draft(done, found)
        likely = np.exp(found.logits[:, 0] - found.log_sum_exp).cumprod()
        self._block = self._block[: 1 + max(1, int((likely >= self.least).sum()))]


class Replayed(NamedTuple):
    """tokens: of all answers without their first ones. cycles: by answer."""

    seconds: float
    tokens: int
    cycles: list[list[Cycle]]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_cycle(self) -> float:
        return self.tokens / sum(map(len, self.cycles))


class Replay:
    """A scheduler that answers ``load`` recorded prompts concurrently. What it has learnt is kept between runs."""

    def __init__(self, texts: Sequence[Text], table: CostTable, load: int) -> None:
        self._texts = texts
        self._clock = VirtualClock()
        self._executor = ReplayingExecutor(texts, table, self._clock)
        self.cost = PassCost(load, max(LONGEST_BLOCK, 64))
        self.cost.measure(table.seconds, seconds=1e9)
        self.scheduler = Scheduler(
            self._executor,
            max_batch=load,
            context=CAPACITY,
            prefill_tokens=CAPACITY,
            cost=self.cost,
            clock=self._clock,
            prefix_cache=None,
        )
        self._acceptance = SharedAcceptance()
        self._lookup = SharedLookupAcceptance()

    def run(self, numbers: Sequence[int], options: dict[str, Any]) -> Replayed:
        """Answer these texts in this order. options: of :class:`SamplingParams`, and ``verified_until``, the least
        product of a verified draft's probabilities.
        """
        finished: dict[int, list[Cycle]] = {}
        for order, number in enumerate(numbers):
            self._submit(self._texts[number], options, order, finished)
        began, tokens = self._clock(), sum(len(self._texts[number].answer) - 1 for number in numbers)
        while self.scheduler.busy:
            self.scheduler.step()
        return Replayed(self._clock() - began, tokens, [finished[order] for order in range(len(numbers))])

    def _submit(self, text: Text, options: dict[str, Any], order: int, finished: dict[int, list[Cycle]]) -> None:
        least = options.get("verified_until", 0.0)
        params = SamplingParams(max_tokens=MAX_TOKENS, **{k: v for k, v in options.items() if k != "verified_until"})
        cycles: list[Cycle] = []

        def receive(update: Update) -> None:
            cycles.extend(update.cycles)
            if update.error is not None:
                raise update.error
            if update.finish_reason is not None:
                finished[order] = cycles

        prompt = text.prompt.tolist()
        answer = (ConfidentAnswer if least else Answer)(
            prompt,
            params,
            Ending(params, frozenset({int(text.answer[-1])})),
            Acceptance(self._acceptance),
            context=CAPACITY,
            mask_id=MASK,
            prefill_step=CAPACITY,
            seed=0,
            lookup=Lookup(prompt, self._lookup.of_new_answer()) if params.lookup else None,
        )
        if isinstance(answer, ConfidentAnswer):
            answer.least = least
        stream: Any = NoText()
        self.scheduler.waiting.append(Request(answer, stream, receive, request_id=order, index=0, update_seconds=None))
