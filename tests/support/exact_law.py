"""An executor whose next-token law is known exactly: a language of a few tokens, computed from the KV pool's own rows.

For tests of the runtime. It follows the step contract exactly: it writes each step's tokens and positions into the rows
of the KV pool, and its logits depend only on the rows that the contract makes visible. So a row of another sequence, a
stale row or visible padding changes the text. Tests compare the scheduler's texts with :func:`greedy_text` and
:func:`text_law`, which use neither a pool nor a batch.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.support.token_masks import best_legal
from trimode import SamplingParams
from trimode.runtime.decoding.acceptance_rates import Acceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.lookup import Lookup, SharedLookupAcceptance
from trimode.runtime.decoding.ruled_rows import Biases
from trimode.runtime.decoding.sampling import kept_weights
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.decoding.token_rules import TokenRules
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Speculated
from trimode.runtime.kv.host_kv_pool import KvPool
from trimode.runtime.kv.prefix_cache import PrefixCache
from trimode.runtime.scheduling.pass_cost import PassCost
from trimode.runtime.scheduling.running_request import Listener, Request
from trimode.runtime.scheduling.scheduler import Scheduler

MASK, END = 0, 1
VOCABULARY = 7  # tokens 2 .. 6 are words


class ExactLawExecutor:
    """agreement: of 256 drafts, how many are the likeliest next word of the text so far; the others are other words."""

    threads = None

    def __init__(
        self, capacity: int = 64, agreement: int = 200, end: bool = True, limit_rows: int | None = None
    ) -> None:
        limit_bytes = None if limit_rows is None else limit_rows * 8
        self.pool = KvPool(layers=1, kv_heads=1, head_dim=1, capacity=capacity, limit_bytes=limit_bytes)
        self.passes = 0
        self._agreement = agreement
        self._end = end

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        self.passes += 1
        self.pool.reserve(step.rows_written)
        tokens, positions = self.pool.buffers
        batch, rows = step.logit_rows.shape
        logits = np.empty((batch, rows, VOCABULARY), np.float32)
        for index in range(batch):
            slot, write, size = step.first_slot + index, int(step.write_indices[index]), step.input_ids.shape[1]
            if not (positions[slot, 0, :write, 0] == np.arange(write)).all():
                raise AssertionError(f"slot {slot}: its {write} committed rows are not those of one text")
            tokens[slot, 0, write : write + size, 0] = step.input_ids[index]
            positions[slot, 0, write : write + size, 0] = step.position_ids[index]
            committed = tuple(int(token) for token in tokens[slot, 0, :write, 0])
            ids = step.input_ids[index].tolist()
            for place, row in enumerate(step.logit_rows[index].tolist()):
                if isinstance(step, CausalStep):
                    seen = [token for token, visible in zip(ids, step.block_mask[index, row], strict=True) if visible]
                    logits[index, place] = law(committed + tuple(seen), self._end)
                else:
                    block = tuple(ids[: int(step.step_lengths[index])])
                    # Rows of padding are computed as well; their logits do not matter.
                    row = min(row, len(block) - 1)
                    logits[index, place] = self._draft(committed, block, row)
        legal = None
        if step.token_mask is not None:  # one word a row
            legal = (step.token_mask >> np.arange(VOCABULARY, dtype=np.uint32) & 1).astype(np.bool_)
        asked = None if step.asked_ids is None else np.take_along_axis(logits, step.asked_ids, axis=-1)
        found = candidates(logits, legal)
        # No more than the step needs: a greedy row that is drawn from would give its best token.
        return Candidates(found.logits[..., : step.top_k], found.tokens[..., : step.top_k], found.log_sum_exp, asked)

    def _draft(self, committed: tuple[int, ...], block: tuple[int, ...], row: int) -> NDArray[np.float32]:
        return draft(committed, block, row, self._agreement, self._end)


class WeakDraftExecutor(ExactLawExecutor):
    """Its drafts are the law's logits with noise: the likeliest word of a place is often the draft's second or third.
    The places behind it are drafted for the draft's own best words.
    """

    def _draft(self, committed: tuple[int, ...], block: tuple[int, ...], row: int) -> NDArray[np.float32]:
        return noisy_draft(committed + block[:1], row, self._end)


class SpeculatingExactLawExecutor(ExactLawExecutor):
    """Drafts and verifies in one call, as an executor on a GPU does."""

    speculations = 0

    def speculate(self, draft: BidirectionalStep, top_k: int | None = None) -> Speculated:
        self.speculations += 1
        drafted = self.run(draft)
        return Speculated(drafted, self.run(draft.verification(drafted.tokens[..., 0], top_k)))


class PreparingExactLawExecutor(SpeculatingExactLawExecutor):
    """Prepares every range of slots and step length when it first runs, and prefers one range: all slots."""

    def __init__(self, *options: Any, **more: Any) -> None:
        super().__init__(*options, **more)
        self._prepared: set[tuple[object, ...]] = set()

    @property
    def preparations(self) -> int:
        return len(self._prepared)

    def padded_slots(self, first: int, last: int, step: int) -> tuple[int, int]:  # noqa: ARG002
        return 0, self.pool.slots - 1

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        self._prepared.add((type(step), step.first_slot, step.input_ids.shape))
        return super().run(step)


class NoText:
    """An empty detokenizer: the tests compare tokens."""

    def feed(self, tokens: list[int]) -> None: ...

    def new_text(self) -> str:
        return ""

    def finish(self) -> str:
        return ""


class Bench:
    """A scheduler over the known language."""

    def __init__(
        self,
        max_batch: int = 8,
        prefix_cache: bool = True,
        capacity: int = 64,
        end: bool = True,
        prefill_tokens: int = 6,
        clock: Callable[[], float] = time.perf_counter,
        limit_rows: int | None = None,
        executor: type[ExactLawExecutor] = ExactLawExecutor,
    ) -> None:
        self.capacity = capacity
        self.submitted = 0
        self.executor = executor(capacity=capacity, end=end, limit_rows=limit_rows)
        self.cost = PassCost(max_batch, 16)
        self.scheduler = Scheduler(
            self.executor,
            max_batch=max_batch,
            context=capacity,
            prefill_tokens=prefill_tokens,
            cost=self.cost,
            clock=clock,
            prefix_cache=PrefixCache(2000) if prefix_cache else None,
        )

    def add(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        listener: Listener,
        seed: int = 0,
        update_seconds: float | None = None,
        rules: TokenRules | None = None,
        biases: Biases | None = None,
    ) -> Request:
        ending = Ending(params, frozenset({END}))
        sequence = Sequence(
            list(prompt),
            params,
            ending,
            Acceptance(),
            context=self.capacity,
            mask_id=MASK,
            prefill_step=4,
            seed=seed,
            rules=rules,
            biases=biases,
            lookup=Lookup(prompt, SharedLookupAcceptance().of_new_answer()) if params.lookup else None,
        )
        self.submitted += 1
        text: Any = NoText()
        request = Request(
            sequence, text, listener, request_id=self.submitted - 1, index=0, update_seconds=update_seconds
        )
        self.scheduler.waiting.append(request)
        return request

    def run(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.busy:
                return
            self.scheduler.step()
        raise AssertionError("the scheduler does not come to an end")


def candidates(logits: NDArray[np.float32], legal: NDArray[np.bool_] | None = None) -> Candidates:
    """The legal tokens of each row, best first; None: every token is legal."""
    return best_legal(logits, np.ones(logits.shape, np.bool_) if legal is None else legal, MASK, VOCABULARY)


@cache
def _hash(key: tuple[object, ...]) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=32).digest()


@cache
def law(text: tuple[int, ...], end: bool = True) -> NDArray[np.float32]:
    """Logits after ``text``: they depend on all of it. ``end``: whether it may end."""
    noise = np.frombuffer(_hash(("law", text)), np.uint8)[:VOCABULARY]
    logits = (noise / 48.0).astype(np.float32)
    logits[END] = logits[END] - 2.0 if end else -1e30
    return logits


@cache
def draft(
    committed: tuple[int, ...], block: tuple[int, ...], row: int, agreement: int, end: bool
) -> NDArray[np.float32]:
    """Logits of the diffusion engine for a place of the block."""
    text = committed + block[:1]
    for place in range(1, row + 1):
        known = block[place]
        if known != MASK and place < row:
            text += (known,)
            continue
        chance = _hash(("draft", committed, block, place))
        guess = greedy(text, end) if chance[0] < agreement else 2 + chance[1] % 5
        text += (guess,)
    logits = np.frombuffer(_hash(("rest", committed, block, row)), np.uint8)[:VOCABULARY] / 64.0
    logits[text[-1]] = 6.0
    return logits.astype(np.float32)


@cache
def noisy_draft(text: tuple[int, ...], place: int, end: bool, noise: float = 2.0) -> NDArray[np.float32]:
    """Logits of a weak draft of a place behind ``text``, 1 for the next one."""
    for _ in range(1, place):
        best = candidates(noisy_draft(text, 1, end, noise)[None, None].copy())
        text += (int(best.tokens[0, 0, 0]),)
    errors = np.frombuffer(_hash(("noise", text)), np.uint8)[:VOCABULARY] / 255.0
    return (law(text, end) + noise * errors).astype(np.float32)


def greedy(text: tuple[int, ...], end: bool = True) -> int:
    ranked = candidates(law(text, end)[None, None].copy())
    return int(ranked.tokens[0, 0, 0])


def greedy_text(prompt: tuple[int, ...], max_tokens: int, end: bool = True) -> list[int]:
    """The text of greedy AR, computed from the law."""
    text = prompt
    while len(text) < len(prompt) + max_tokens and (len(text) == len(prompt) or text[-1] != END):
        text += (greedy(text, end),)
    return list(text[len(prompt) :])


def text_law(prompt: tuple[int, ...], length: int, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The exact probability of every continuation of ``length`` tokens, in a language that does not end."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, probability in found.items():
            ranked = candidates(after_penalties(law(prompt + text, end=False), prompt, text, params)[None, None])
            weights = kept_weights(ranked.logits[0], params)[0]
            for token, weight in zip(ranked.tokens[0, 0].tolist(), weights / weights.sum(), strict=True):
                if weight:
                    longer[(*text, token)] = probability * float(weight)
        found = longer
    return found


def after_penalties(
    logits: NDArray[np.float32], prompt: tuple[int, ...], text: tuple[int, ...], params: SamplingParams
) -> NDArray[np.float32]:
    """A copy of a row's logits with the penalties for the tokens of the prompt and the text."""
    logits = logits.copy()
    for token in {*prompt, *text}:
        positive = logits[token] > 0
        logits[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
    for token, count in Counter(text).items():
        logits[token] -= params.presence_penalty + params.frequency_penalty * count
    return logits


class Variation(NamedTuple):
    """distance: half the L1 distance between counts and law. by_chance: its expected value for samples of the law.
    deviation: its standard deviation.
    """

    distance: float
    by_chance: float
    deviation: float

    @property
    def is_chance(self) -> bool:
        return self.distance <= self.by_chance + 4 * self.deviation


def total_variation(found: dict[tuple[int, ...], int], exact: dict[tuple[int, ...], float]) -> Variation:
    draws = sum(found.values())
    keys = set(found) | set(exact)
    distance = sum(abs(found.get(key, 0) / draws - exact.get(key, 0.0)) for key in keys) / 2
    # The error of a binomial share is nearly normal; these are the mean and the deviation of its absolute value. The
    # shares sum to 1, so the true values are slightly smaller.
    variances = np.array([p * (1 - p) / draws for p in exact.values()])
    by_chance = np.sqrt(2 / np.pi * variances).sum() / 2
    deviation = np.sqrt((1 - 2 / np.pi) * variances.sum()) / 2
    return Variation(distance, float(by_chance), float(deviation))


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(2, VOCABULARY, size=int(rng.integers(1, 12))).tolist()) for _ in range(count)]
