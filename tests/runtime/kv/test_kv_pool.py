"""The KV pool against a plain dictionary of sequences: whatever comes and goes, each keeps its own rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trimode.common.errors import TriModeError
from trimode.runtime.kv.kv_pool import FIRST_ROWS, KvPool


class PoolAgainstModel(RuleBasedStateMachine):
    """Every row of a sequence holds the sequence's own number; the model knows which slot holds which sequence."""

    @initialize()
    def start(self) -> None:
        self.pool = KvPool(layers=2, kv_heads=1, head_dim=2, capacity=600)
        self.lengths: dict[int, int] = {}  # sequence -> rows
        self.slot_of: dict[int, int] = {}
        self.next = 1

    @rule()
    def join(self) -> None:
        if len(self.slot_of) < 9:
            self.slot_of[self.next] = self.pool.acquire()
            self.lengths[self.next] = 0
            self.next += 1

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data(), more=st.integers(1, 200))
    def write(self, data: st.DataObject, more: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.slot_of)))
        begin, end = self.lengths[sequence], min(self.lengths[sequence] + more, 600)
        self.pool.reserve(end)
        for buffer in self.pool.buffers:
            buffer[self.slot_of[sequence], :, begin:end] = sequence
        self.lengths[sequence] = end

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.slot_of)))
        slot = self.slot_of.pop(sequence)
        del self.lengths[sequence]
        moved_from = self.pool.release(slot)
        for other, place in self.slot_of.items():
            if place == moved_from:
                self.slot_of[other] = slot

    @invariant()
    def every_sequence_has_its_rows(self) -> None:
        for sequence, slot in self.slot_of.items():
            for buffer in self.pool.buffers:
                assert (buffer[slot, :, : self.lengths[sequence]] == sequence).all()

    @invariant()
    def active_slots_are_the_first_ones(self) -> None:
        assert sorted(self.slot_of.values()) == list(range(self.pool.active))
        assert self.pool.active <= self.pool.slots
        assert max(self.lengths.values(), default=0) <= self.pool.rows <= 600


TestPool = PoolAgainstModel.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_rows_grow_by_doubling_up_to_the_capacity() -> None:
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=300)
    seen = []
    for rows in (1, FIRST_ROWS, FIRST_ROWS + 1, 257, 300):
        pool.reserve(rows)
        seen.append((pool.rows, pool.generation))
    assert seen == [(128, 0), (128, 0), (256, 1), (300, 2), (300, 2)]
    with pytest.raises(TriModeError, match="301 tokens exceeds the engine's capacity of 300"):
        pool.reserve(301)


def test_an_empty_pool_is_small_again() -> None:
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=1000)
    pool.reserve(900)
    pool.release(pool.acquire())
    assert pool.rows == FIRST_ROWS
    assert pool.generation == 2


def test_a_slot_that_is_not_active_cannot_be_released() -> None:
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=8)
    with pytest.raises(ValueError, match="slot 0 is not active"):
        pool.release(0)


def test_fresh_rows_are_zero_after_growth() -> None:
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=1000)
    pool.acquire()
    pool.buffers[0][:] = np.nan
    pool.reserve(500)
    assert not np.isnan(pool.buffers[0][0, :, 128:]).any()


def test_a_pool_at_its_limit_trades_slots_for_rows() -> None:
    """Slots of a burst that is over do not stand in the way of a long sequence."""
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=2048, limit=2 * 8 * FIRST_ROWS * 2 * 4)
    for _ in range(8):
        assert pool.holds(pool.active + 1, FIRST_ROWS)
        pool.acquire()
    assert not pool.holds(9, 1)
    assert not pool.holds(8, FIRST_ROWS + 1)
    assert pool.fits(8 * FIRST_ROWS)  # alone, whatever is there now
    assert not pool.fits(8 * FIRST_ROWS + 1)
    while pool.active > 1:
        pool.release(pool.active - 1)
    pool.buffers[0][0, :, :5] = 7
    assert pool.holds(1, 8 * FIRST_ROWS)
    pool.reserve(8 * FIRST_ROWS)
    assert (pool.slots, pool.rows) == (1, 8 * FIRST_ROWS)
    assert (pool.buffers[0][0, :, :5] == 7).all()
