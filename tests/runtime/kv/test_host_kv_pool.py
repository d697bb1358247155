"""The KV pool compared with a dictionary of sequences: each keeps its own rows, whichever others come and go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trimode.common.errors import TriModeError
from trimode.runtime.kv import default_budget
from trimode.runtime.kv.host_kv_pool import FIRST_ROWS, KvBudget, KvPool

LIMIT_BYTES = 1500 * 2 * 2 * 2 * 4  # 1500 rows: two sequences of the capacity, or eleven short ones


class PoolAgainstModel(RuleBasedStateMachine):
    """Every row of a sequence holds the sequence's own number; the model knows which slot holds which sequence."""

    @initialize()
    def start(self) -> None:
        self.pool = KvPool(layers=2, kv_heads=1, head_dim=2, capacity=600, limit_bytes=LIMIT_BYTES)
        self.lengths: dict[int, int] = {}  # sequence -> rows
        self.needs: dict[int, int] = {}  # sequence -> the most rows it may come to
        self.slot_of: dict[int, int] = {}
        self.next = 1

    @rule(need=st.integers(1, 600))
    def join(self, need: int) -> None:
        longest = max([need, *self.needs.values()])
        if self.pool.most_rows(len(self.slot_of) + 1) >= longest:
            self.slot_of[self.next] = self.pool.acquire(longest)
            self.lengths[self.next], self.needs[self.next] = 0, need
            self.next += 1

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data(), more=st.integers(1, 200), padding=st.integers(0, 100))
    def write(self, data: st.DataObject, more: int, padding: int) -> None:
        """A pass writes a sequence's rows, and padding that may reach as far as the budget allows."""
        sequence = data.draw(st.sampled_from(sorted(self.slot_of)))
        begin, end = self.lengths[sequence], min(self.lengths[sequence] + more, self.needs[sequence])
        self.pool.reserve(min(end + padding, self.pool.most_rows(self.pool.active)))
        for buffer in self.pool.buffers:
            buffer[self.slot_of[sequence], :, begin:end] = sequence
        self.lengths[sequence] = end

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.slot_of)))
        slot = self.slot_of.pop(sequence)
        del self.lengths[sequence], self.needs[sequence]
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

    @invariant()
    def the_buffers_stay_within_the_limit(self) -> None:
        assert sum(buffer.nbytes for buffer in self.pool.buffers) <= LIMIT_BYTES


TestPool = PoolAgainstModel.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_budget_is_shared_by_the_sequences_that_run() -> None:
    budget = KvBudget(capacity=30, rows=80, spare_rows=2)
    assert [budget.most_rows(sequences) for sequences in (0, 1, 2, 3, 4, 40, 41)] == [30, 30, 30, 24, 18, 0, -1]
    assert (budget.fits(4, 18), budget.fits(4, 19), budget.fits(1, 78), budget.fits(1, 79)) == (True, False) * 2
    without = KvBudget(capacity=30, rows=None, spare_rows=2)
    assert (without.most_rows(100), without.fits(100, 1000)) == (30, True)


def test_the_default_budget_is_four_fifths_of_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_budget, "available_memory", lambda: 1100)
    assert [default_budget.default_kv_bytes(weights) for weights in (100, 1098, 1099, 2000)] == [800, 1, 1, 1]


def test_slots_double_while_the_limit_allows_it() -> None:
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=10, limit_bytes=5 * 10 * 16)
    slots = []
    for _ in range(5):
        pool.acquire()
        slots.append(pool.slots)
    assert slots == [1, 2, 4, 4, 5]
    assert pool.generation == 3
    unlimited = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=10)
    for _ in range(5):
        unlimited.acquire()
    assert unlimited.slots == 8


def test_the_last_sequence_moves_into_a_slot_that_is_freed() -> None:
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=300)
    for slot in range(3):
        assert pool.acquire() == slot
    pool.reserve(300)
    for buffer in pool.buffers:
        buffer[:3] = np.arange(3)[:, None, None, None]
    assert pool.release(0) == 2
    assert [buffer[:2, 0, 0, 0].tolist() for buffer in pool.buffers] == [[2, 1]] * 2
    assert pool.release(1) == 1
    assert (pool.active, pool.rows) == (1, 300)  # one is left
    with pytest.raises(ValueError, match="slot 1 is not active; 1 are"):
        pool.release(1)
    with pytest.raises(ValueError, match="slot -1 is not active"):
        pool.release(-1)
    assert pool.release(0) == 0
    assert (pool.active, pool.rows, pool.slots) == (0, 128, 4)


def test_rows_are_read_moved_and_written_in_their_own_slot() -> None:
    pool = KvPool(layers=2, kv_heads=3, head_dim=2, capacity=20)
    for _ in range(2):
        pool.acquire()
    for number, buffer in enumerate(pool.buffers):
        buffer[:2] = 100 * number + np.arange(2 * 20).reshape(2, 1, 20, 1)
    rows = pool.read_rows(1, 3, 7)
    assert rows.shape == (4, 3, 4, 2)
    assert rows[:, 0, :, 0].tolist() == [[100 * number + row for row in range(23, 27)] for number in range(4)]
    pool.move_rows(1, 10, [12, 15, 16])
    assert [pool.buffers[2][1, 2, row, 1] for row in (9, 10, 11, 12, 13)] == [229, 232, 235, 236, 233]
    pool.write_rows(0, 5, rows)
    assert [pool.buffers[3][0, 1, row, 0] for row in (4, 5, 8, 9)] == [304, 323, 326, 309]
    assert pool.row_bytes == 2 * 2 * 3 * 2 * 4


def test_rows_grow_by_an_eighth_up_to_the_capacity() -> None:
    """In multiples of 32: 129 to 145, 161 to 181, 225 to 253, 281 beyond the capacity."""
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=300)
    seen = []
    for rows in (1, FIRST_ROWS, FIRST_ROWS + 1, 160, 161, 225, 281, 300):
        pool.reserve(rows)
        seen.append((pool.rows, pool.generation))
    assert seen == [(128, 0), (128, 0), (160, 1), (160, 1), (192, 2), (256, 3), (300, 4), (300, 4)]
    with pytest.raises(TriModeError, match="301 tokens exceeds the engine's capacity of 300"):
        pool.reserve(301)


def test_an_empty_pool_is_small_again() -> None:
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=1000)
    pool.reserve(900)
    pool.release(pool.acquire())
    assert pool.rows == FIRST_ROWS
    assert pool.generation == 2


@pytest.mark.parametrize(
    ("needed", "rows"), [(None, 928), (1000, 928), (600, 928), (398, 448), (300, 352), (100, 128), (0, 128)]
)
def test_rows_behind_a_long_sequence_are_given_up_where_others_need_less_than_half(
    needed: int | None, rows: int
) -> None:
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=1000)
    for _ in range(3):
        pool.acquire()
    pool.reserve(800)
    assert pool.rows == 928
    for slot in range(3):
        pool.buffers[1][slot, :, :400] = slot
    pool.release(0, needed)
    assert (pool.active, pool.rows) == (2, rows)
    kept = min(400, rows)
    assert [pool.buffers[1][slot, 0, :kept, 1].tolist() for slot in range(2)] == [[2.0] * kept, [1.0] * kept]


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
    """Free slots of an earlier burst do not keep a long sequence from its rows."""
    row_bytes = 2 * 2 * 4
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=2048, limit_bytes=8 * FIRST_ROWS * row_bytes)
    assert pool.row_bytes == row_bytes
    for _ in range(8):
        assert pool.most_rows(pool.active + 1) >= FIRST_ROWS
        pool.acquire(FIRST_ROWS)
    assert pool.most_rows(8) == FIRST_ROWS
    with pytest.raises(
        TriModeError, match="8 sequences of 129 tokens exceed kv_cache_bytes of 16384, which allows 128"
    ):
        pool.reserve(FIRST_ROWS + 1)
    with pytest.raises(TriModeError, match="9 sequences of 128 tokens exceed kv_cache_bytes"):
        pool.acquire()
    assert pool.most_rows(1) == 8 * FIRST_ROWS  # alone, whatever the pool holds now
    while pool.active > 1:
        pool.release(pool.active - 1)
    pool.buffers[0][0, :, :5] = 7
    pool.reserve(8 * FIRST_ROWS)
    assert (pool.slots, pool.rows) == (1, 8 * FIRST_ROWS)
    assert (pool.buffers[0][0, :, :5] == 7).all()


def test_a_pool_at_its_limit_trades_rows_for_slots() -> None:
    """Rows of an earlier long sequence do not keep short ones from their slots."""
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=2048, limit_bytes=1000 * 16)
    pool.acquire(1000)
    pool.reserve(1000)
    pool.buffers[1][0, :, :200] = 3
    for sequences in range(2, 6):
        pool.acquire(200)
        assert pool.slots >= sequences
        assert pool.slots * pool.rows <= 1000
        assert (pool.buffers[1][0, :, :200] == 3).all()
    assert pool.rows == 200


def test_a_limit_below_one_token_is_refused() -> None:
    with pytest.raises(TriModeError, match="kv_cache_bytes is 15, but one token's keys and values take 16 bytes"):
        KvPool(layers=1, kv_heads=1, head_dim=2, capacity=8, limit_bytes=15)
    assert KvPool(layers=1, kv_heads=1, head_dim=2, capacity=8, limit_bytes=16).rows == 1
    with pytest.raises(TriModeError, match="one token's keys and values take 48 bytes"):
        KvPool(layers=1, kv_heads=1, head_dim=2, capacity=8, limit_bytes=32, spare_rows=2)


def test_spare_rows_lie_behind_every_sequence_and_within_the_limit() -> None:
    row_bytes = 2 * 2 * 4
    pool = KvPool(layers=1, kv_heads=1, head_dim=2, capacity=200, limit_bytes=403 * row_bytes, spare_rows=1)
    pool.acquire()
    pool.reserve(200)
    assert (pool.rows, pool.buffers[0].shape[2]) == (200, 201)
    assert pool.most_rows(2) == 200
    pool.acquire(200)
    assert sum(buffer.nbytes for buffer in pool.buffers) == 402 * row_bytes
    with pytest.raises(TriModeError, match="exceeds the engine's capacity of 200"):
        pool.reserve(201)
