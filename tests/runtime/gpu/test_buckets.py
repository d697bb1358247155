"""Buckets: few shapes, each of which holds its steps and stays inside the pool."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.runtime.executor import CausalStep
from trimode.runtime.gpu.buckets import CHEAP_TOKENS, SMALLEST_WINDOW, Bucket, bucket_of, padded_slots

MAX_STEP, CAPACITY, TOP_K = 200, 3000, 4


def step(length: int, committed: list[int], rows: int, first_slot: int = 0) -> CausalStep:
    batch = len(committed)
    ids = np.zeros((batch, length), np.int64)
    return CausalStep.chain(first_slot, ids, np.array(committed), np.zeros((batch, rows), np.int64))


@given(
    length=st.integers(1, MAX_STEP),
    rooms=st.lists(st.integers(0, CAPACITY), min_size=1, max_size=8),
    rows=st.integers(1, MAX_STEP),
    first_slot=st.integers(0, 3),
)
def test_a_bucket_holds_the_step_and_stays_inside_the_pool(
    length: int, rooms: list[int], rows: int, first_slot: int
) -> None:
    committed = [min(room, CAPACITY - length) for room in rooms]
    rows = min(rows, length)
    bucket = bucket_of(step(length, committed, rows, first_slot), MAX_STEP, CAPACITY, True, TOP_K)
    assert (bucket.kind, bucket.first_slot, bucket.batch) == (CausalStep, first_slot, len(committed))
    assert length <= bucket.step <= MAX_STEP
    assert rows <= bucket.rows <= bucket.step
    assert max(committed) + bucket.step <= bucket.window <= CAPACITY


def test_there_are_few_of_them() -> None:
    """Away from the pool's end: eight lengths and the largest, two kinds of rows, four windows and the whole."""
    seen = {
        bucket_of(step(length, [committed], rows), MAX_STEP, CAPACITY, True, TOP_K)
        for length in range(1, MAX_STEP + 1)
        for committed in range(0, CAPACITY - 2 * MAX_STEP, 211)
        for rows in (1, length)
    }
    assert {bucket.step for bucket in seen} == {1, 2, 4, 8, 16, 32, 64, 128, MAX_STEP}
    assert {bucket.window for bucket in seen} == {SMALLEST_WINDOW, 512, 1024, 2048, CAPACITY}
    assert all(bucket.rows in (1, bucket.step) for bucket in seen)


@pytest.mark.parametrize(
    ("length", "committed", "expected"),
    [
        (16, 0, (16, 256)),
        (17, 0, (32, 256)),
        (17, 224, (32, 256)),
        (17, 225, (32, 512)),
        (17, CAPACITY - 32, (32, CAPACITY)),
        (17, CAPACITY - 31, (17, CAPACITY)),  # 32 would reach past the last row
        (1, CAPACITY - 1, (1, CAPACITY)),
    ],
)
def test_by_hand(length: int, committed: int, expected: tuple[int, int]) -> None:
    bucket = bucket_of(step(length, [3, committed], length), MAX_STEP, CAPACITY, True, TOP_K)
    assert bucket == Bucket(CausalStep, 0, 2, expected[0], expected[0], expected[1], TOP_K, False, 0)
    in_place = bucket_of(step(length, [3, committed], length), MAX_STEP, CAPACITY, False, TOP_K)
    assert in_place == bucket._replace(window=CAPACITY)


def test_a_bucket_has_a_token_mask_and_asked_ids_only_for_passes_that_have_them() -> None:
    """The numbers of asked ids and of their rows are rounded up to powers of two."""
    ordinary = step(5, [0, 7], 3)
    bucket = bucket_of(ordinary, MAX_STEP, CAPACITY, True, TOP_K)
    assert (bucket.top_k, bucket.masked, bucket.asked) == (TOP_K, False, 0)
    masked = replace(ordinary, token_mask=np.zeros((2, 3, 9), np.uint32))
    assert bucket_of(masked, MAX_STEP, CAPACITY, True, TOP_K) == bucket._replace(masked=True, rows=4)
    for asked, padded in ((1, 1), (2, 2), (3, 4), (5, 8), (300, 512)):
        asking = replace(ordinary, asked_ids=np.zeros((2, 3, asked), np.int64))
        assert bucket_of(asking, MAX_STEP, CAPACITY, True, 1) == bucket._replace(top_k=1, rows=4, asked=padded)


@given(slots=st.integers(1, 80), step=st.integers(1, MAX_STEP), data=st.data())
def test_padded_slots_hold_the_slots_of_the_pass_and_are_in_the_pool(
    slots: int, step: int, data: st.DataObject
) -> None:
    """A pass of more than 64 tokens has at most an eighth more sequences."""
    last = data.draw(st.integers(0, slots - 1))
    first = data.draw(st.integers(0, last))
    begin, end = padded_slots(first, last, step, slots)
    assert 0 <= begin <= first <= last <= end < slots
    padded, batch = end - begin + 1, last - first + 1
    if padded * step > CHEAP_TOKENS:
        assert padded <= batch * 9 / 8


def test_passes_of_one_token_have_few_batches_and_begin_at_slot_0() -> None:
    seen = {padded_slots(first, last, 1, 64) for last in range(64) for first in range(last + 1)}
    assert seen == {(0, batch - 1) for batch in (1, 2, 4, 8, 16, 32, 64)}


def test_large_passes_have_few_batches() -> None:
    batches = {end + 1 for last in range(64) for _, end in [padded_slots(0, last, 128, 64)]}
    assert batches == {*range(1, 17), *range(18, 33, 2), *range(36, 65, 4)}


@pytest.mark.parametrize(
    ("first", "last", "step", "expected"),
    [
        (3, 3, 16, (0, 3)),  # four sequences of 16 tokens cost what one does
        (3, 3, 17, (3, 3)),  # padded to 32 tokens each, they do not
        (2, 30, 32, (0, 31)),
        (4, 37, 32, (4, 39)),  # 40 sequences would be more than an eighth more than 34
        (1, 17, 32, (0, 17)),
        (40, 62, 32, (40, 63)),
        (40, 56, 32, (40, 57)),
    ],
)
def test_slots_by_hand(first: int, last: int, step: int, expected: tuple[int, int]) -> None:
    assert padded_slots(first, last, step, 64) == expected
