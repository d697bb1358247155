"""Steps of ragged batches for an executor, whose results are compared with another executor's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.driver_double import DriverDouble
from tests.support.token_masks import packed
from trimode.common.errors import TriModeError
from trimode.engine.plan_file import MOST_ASKED
from trimode.runtime.executor import (
    BidirectionalStep,
    Candidates,
    CausalStep,
    Executor,
    Speculated,
    SpeculatingExecutor,
)
from trimode.runtime.loading import load_engine

MASK = 100
# Relative, fp32 on both sides.
CLOSE, FAR = 1e-4, 1e-2
Results = list[NDArray[Any]]


class StepCases(NamedTuple):
    """Three sequences of ``lengths`` tokens in slots 0, 1 and 2, each followed by a block of its number of ``blocks``.

    max_step: tokens of a prefill pass. capacity: rows of a slot. Token ids are below ``vocabulary``. Each case returns
    the logits and the log-sum-exp of every row that is not padding.
    """

    lengths: tuple[int, int, int]
    blocks: tuple[int, int, int]
    max_step: int
    capacity: int
    vocabulary: int

    def prefill(self, engine: Executor) -> Results:
        rng, found = np.random.default_rng(0), []
        for length in self.lengths:
            ids, slot = self._tokens(rng, 1, length), engine.pool.acquire()
            for start in range(0, length, self.max_step):
                chunk = ids[:, start : start + self.max_step]
                step = CausalStep.chain(slot, chunk, np.array([start]), np.array([[chunk.shape[1] - 1]]))
                found += rows_of_logits(engine.run(step), (1,))
        return found

    def draft_step(self, first_slot: int = 0, count: int = 3) -> BidirectionalStep:
        """A block after each sequence, of different lengths, padded to the longest; one of them without the adapter."""
        which = slice(first_slot, first_slot + count)
        longest = max(self.blocks[which])
        ids = np.full((count, longest), MASK)
        ids[:, 0] = np.arange(200, 200 + count)
        rows = np.tile(np.arange(longest), (count, 1))
        adapter = np.array([True, False, True])[which]
        lengths = np.array(self.blocks[which])
        return BidirectionalStep.block(first_slot, ids, np.array(self.lengths[which]), rows, lengths, adapter)

    def draft_and_commit(self, engine: Executor) -> Results:
        found = self.prefill(engine)
        draft = self.draft_step()
        drafted = engine.run(draft)
        found += rows_of_logits(drafted, self.blocks)
        verified = engine.run(draft.verification(drafted.tokens[:, :, 0]))
        return found + rows_of_logits(verified, self.blocks)

    def some_of_the_slots(self, engine: Executor) -> Results:
        """Passes over slots 1 and 2, then over all slots. No pass may change rows of other slots."""
        found = self.prefill(engine)
        found += rows_of_logits(engine.run(self.draft_step(1, 2)), self.blocks[1:])
        return found + rows_of_logits(engine.run(self.draft_step()), self.blocks)

    def after_a_release(self, engine: Executor) -> Results:
        """Slot 0 is released: the last sequence moves into it and continues there."""
        found = self.prefill(engine)
        assert engine.pool.release(0) == 2
        ids = self._tokens(np.random.default_rng(1), 2, 9)
        starts = np.array([self.lengths[2], self.lengths[1]])
        step = CausalStep.chain(0, ids, starts, np.tile(np.arange(9), (2, 1)))
        return found + rows_of_logits(engine.run(step), (9, 9))

    def a_tree(self, engine: Executor) -> Results:
        """A tree of drafts: its block mask is not triangular, and positions are depths."""
        found = self.prefill(engine)
        mask = np.zeros((1, 5, 5), np.bool_)
        for node, parent in enumerate([None, 0, 0, 1, 2]):
            mask[0, node] = mask[0, parent] if parent is not None else False
            mask[0, node, node] = True
        positions = self.lengths[1] + np.array([[0, 1, 1, 2, 2]])
        ids = np.array([[300, 301, 302, 303, 304]])
        step = CausalStep(1, ids, positions, np.array([self.lengths[1]]), np.arange(5)[None], mask)
        return found + rows_of_logits(engine.run(step), (5,))

    def up_to_the_capacity(self, engine: Executor) -> Results:
        """Steps up to the last row. The last ones, of 12, 5 and 1 tokens, leave no room for longer padding."""
        rng, found, at = np.random.default_rng(2), self.prefill(engine), self.lengths[2]
        chunks, rest = divmod(self.capacity - at - 18, self.max_step)
        for size in (*[self.max_step] * chunks, *([rest] if rest else []), 12, 5, 1):
            step = CausalStep.chain(2, self._tokens(rng, 1, size), np.array([at]), np.array([[size - 1]]))
            found += rows_of_logits(engine.run(step), (1,))
            at += size
        assert at == self.capacity
        return found

    def prefix_reused(self, engine: Executor) -> Results:
        """The first rows of a sequence, copied into another slot, are used there."""
        found = self.prefill(engine)
        reused, tail = self.lengths[2] * 2 // 3, self.max_step * 5 // 8
        engine.pool.write_rows(1, 0, engine.pool.read_rows(2, 0, reused))
        ids = self._tokens(np.random.default_rng(3), 1, tail)
        step = CausalStep.chain(1, ids, np.array([reused]), np.arange(tail)[None])
        return found + rows_of_logits(engine.run(step), (tail,))

    def again_and_again(self, engine: Executor) -> Results:
        """Steps of one shape with different tokens: each replay uses its own tokens, not the captured ones."""
        found = self.prefill(engine)
        for seed in range(3):
            ids = self._tokens(np.random.default_rng(seed), 3, 8)
            step = CausalStep.chain(0, ids, np.array(self.lengths), np.tile(np.arange(8), (3, 1)))
            found += rows_of_logits(engine.run(step), (8, 8, 8))
        return found

    def speculated(self, engine: Executor) -> Results:
        """Draft and commit in one launch if the executor can do this, in two passes otherwise."""
        found = self.prefill(engine)
        for _ in range(2):
            draft = self.draft_step()
            if isinstance(engine, SpeculatingExecutor):
                drafted, verified = engine.speculate(draft)
            else:
                drafted = engine.run(draft)
                verified = engine.run(draft.verification(drafted.tokens[:, :, 0]))
            found += rows_of_logits(drafted, self.blocks) + rows_of_logits(verified, self.blocks)
        return found

    def masked(self, engine: Executor) -> Results:
        """Passes with token masks, asked ids, both and neither take turns. Three kinds come back after others."""
        found, rng = self.prefill(engine), np.random.default_rng(4)
        draft = dataclasses.replace(self.draft_step(), logit_rows=np.array([[0, 1, 2], [2, 2, 0], [1, 0, 2]]))
        for step in (draft, dataclasses.replace(draft.verification(), logit_rows=draft.logit_rows)):
            for masked, asks in ((0, 0), (1, 0), (1, 1), (0, 1), (1, 1), (1, 0), (0, 0)):
                legal = rng.random((3, 3, self.vocabulary)) < rng.choice([0.05, 0.5, 1.0], (3, 3, 1))
                legal[2, 0] = False
                legal[2, 1] = np.arange(self.vocabulary) == MASK + 5
                asked = rng.integers(0, self.vocabulary, (3, 3, 3)) if asks else None
                mask = packed(legal) if masked else None
                found += all_results(engine.run(dataclasses.replace(step, token_mask=mask, asked_ids=asked)), (3, 3, 3))
        return found

    def masked_rows_of_a_long_step(self, engine: Executor) -> Results:
        """A mask and an asked id for every row."""
        found, rng, length = self.prefill(engine), np.random.default_rng(5), self.max_step - 3
        at, rows = np.array([self.lengths[1]]), np.arange(length)[None]
        step = CausalStep.chain(1, self._tokens(rng, 1, length), at, rows)
        legal = rng.random((1, length, self.vocabulary)) < 0.1
        asked = rng.integers(0, self.vocabulary, (1, length, 1))
        found_rows = engine.run(dataclasses.replace(step, token_mask=packed(legal), asked_ids=asked))
        return found + all_results(found_rows, (length,))

    def _tokens(self, rng: np.random.Generator, sequences: int, length: int) -> NDArray[np.int64]:
        """Ids above the special tokens."""
        return rng.integers(MASK + 1, self.vocabulary, (sequences, length))


Run = Callable[[StepCases, Executor], Results]
RUNS: list[Run] = [
    *(StepCases.draft_and_commit, StepCases.some_of_the_slots, StepCases.after_a_release, StepCases.a_tree),
    *(StepCases.up_to_the_capacity, StepCases.prefix_reused, StepCases.again_and_again, StepCases.speculated),
    *(StepCases.masked, StepCases.masked_rows_of_a_long_step),
]


def rows_of_logits(found: Candidates, lengths: tuple[int, ...]) -> Results:
    """Logits and log-sum-exp of the rows that are not padding, concatenated. Illegal tokens' are limited to -1000, so
    that the others matter.
    """
    whole = np.maximum(np.concatenate([found.logits, found.log_sum_exp[..., None]], axis=-1), -1000)
    return [whole[sequence, :length] for sequence, length in enumerate(lengths)]


def all_results(found: Candidates, lengths: tuple[int, ...]) -> Results:
    """:func:`rows_of_logits`, and the asked logits of the same rows."""
    asked = found.asked_logits
    rows = [] if asked is None else [asked[sequence, :length] for sequence, length in enumerate(lengths)]
    return rows_of_logits(found, lengths) + rows


def distance(cases: StepCases, run: Run, expected: Path, engine: Path) -> float:
    """The largest relative L2 distance of a result of ``engine`` from that of the engine ``expected``. NaN if a result
    is.
    """
    wanted, found = (run(cases, load_engine(folder, verify=False).executor) for folder in (expected, engine))
    return float(
        np.max([np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in zip(found, wanted, strict=True)])
    )


def speculate_with_one_wait(engine: SpeculatingExecutor, cuda: DriverDouble) -> tuple[BidirectionalStep, Speculated]:
    """A block is speculated three times: each waits once and sends little, the last is one launch without allocations.

    Returns the draft and the last results.
    """
    slot = engine.pool.acquire()
    engine.run(CausalStep.chain(slot, np.arange(200, 240)[None], np.array([0]), np.array([[39]])))
    ids = np.full((1, 32), MASK)
    ids[0, 0] = 300
    draft = BidirectionalStep.block(slot, ids, np.array([40]), np.arange(32)[None], np.array([32]), np.array([True]))
    for _ in range(3):
        waits, crossed, launches, free = cuda.synchronisations, cuda.crossed, cuda.launches, cuda.free
        found = engine.speculate(draft)
        assert cuda.synchronisations - waits == 1
        assert cuda.crossed - crossed <= 4096
    assert cuda.launches - launches == 1
    assert cuda.free == free
    return draft, found


def ask_as_many_as_plans_take(engine: Executor) -> None:
    """512 asked ids of a row are answered, one more is refused."""
    step = CausalStep.chain(engine.pool.acquire(), np.array([[300]]), np.array([0]), np.array([[0]]))
    found = engine.run(dataclasses.replace(step, asked_ids=np.zeros((1, 1, MOST_ASKED), np.int64))).asked_logits
    assert found is not None
    assert found.shape == (1, 1, MOST_ASKED)
    with pytest.raises(TriModeError, match="513 asked ids of a row; plans take 512"):
        engine.run(dataclasses.replace(step, asked_ids=np.zeros((1, 1, MOST_ASKED + 1), np.int64)))
