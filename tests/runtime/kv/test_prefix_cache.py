"""Prefix reuse against plain search: the longest beginning of a prompt that some text had, and its own rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.runtime.kv.kv_pool import KvPool
from trimode.runtime.kv.prefix_cache import BLOCK, PrefixCache

LAYERS, CAPACITY = 2, 400


def fill(pool: KvPool, slot: int, text: np.ndarray) -> None:
    """Every row holds a number of its whole beginning, as KV rows depend on all tokens before."""
    pool.reserve(len(text))
    for buffer in pool.buffers:
        buffer[slot, 0, : len(text), 0] = beginnings(text)


def beginnings(text: np.ndarray) -> np.ndarray:
    number, found = 7, []
    for token in text.tolist():
        number = (number * 31 + token) % 65521
        found.append(number)
    return np.array(found, np.float32)


texts = st.lists(st.integers(0, 2), min_size=1, max_size=100).map(lambda text: np.array(text, np.int64))


@settings(max_examples=150, deadline=None)
@given(known=st.lists(texts, max_size=5), prompt=texts, cut=st.integers(0, 100))
def test_the_longest_known_beginning_comes_back_with_its_own_rows(
    known: list[np.ndarray], prompt: np.ndarray, cut: int
) -> None:
    if known:  # a prompt that goes on from a known text
        prompt = np.concatenate((known[0][:cut], prompt))
    cache = PrefixCache(1 << 30)
    for text in known:
        pool = KvPool(LAYERS, 1, 1, CAPACITY)
        fill(pool, pool.acquire(), text)
        cache.store(text, pool, 0)
    pool = KvPool(LAYERS, 1, 1, CAPACITY)
    pool.acquire()
    slot = pool.acquire()
    rows = cache.restore(prompt, pool, slot)
    for buffer in pool.buffers:
        np.testing.assert_array_equal(buffer[slot, 0, :rows, 0], beginnings(prompt)[:rows])
        assert not buffer[0].any()
    # Whole blocks of any text, and a text's short last block where all of it matches.
    best = 0
    for text in known:
        common = int(np.argmin([*(text[: len(prompt)] == prompt[: len(text)]), False]))
        whole = common - common % BLOCK
        best = max(best, common if common in (len(text), len(prompt)) and common == len(text) else whole)
    assert rows >= min(best, len(prompt) - 1)
    assert rows < len(prompt)


def test_the_same_words_after_another_beginning_are_another_text() -> None:
    one, other, same = (np.full(BLOCK, token) for token in (1, 2, 3))
    cache, pool = PrefixCache(1 << 30), KvPool(LAYERS, 1, 1, CAPACITY)
    pool.acquire()
    for text in (np.concatenate((one, same)), other):
        fill(pool, 0, text)
        cache.store(text, pool, 0)
    assert cache.restore(np.concatenate((other, same, [4])), pool, 0) == BLOCK


@settings(max_examples=50, deadline=None)
@given(known=st.lists(texts, min_size=1, max_size=12), blocks=st.integers(0, 4))
def test_it_never_holds_more_than_it_may(known: list[np.ndarray], blocks: int) -> None:
    limit = blocks * BLOCK * 2 * LAYERS * 4
    cache = PrefixCache(limit)
    for text in known:
        pool = KvPool(LAYERS, 1, 1, CAPACITY)
        fill(pool, pool.acquire(), text)
        cache.store(text, pool, 0)
        assert cache.bytes <= limit
    last = known[-1]
    if len(last) <= BLOCK * blocks:
        assert cache.restore(np.append(last, 0), pool, 0) == len(last)


def test_the_least_recently_used_goes_first() -> None:
    pool = KvPool(LAYERS, 1, 1, CAPACITY)
    pool.acquire()
    cache = PrefixCache(3 * BLOCK * 2 * LAYERS * 4)
    stored = [np.full(BLOCK, token) for token in range(4)]
    for text in stored[:3]:
        fill(pool, 0, text)
        cache.store(text, pool, 0)
    assert cache.restore(np.append(stored[0], 9), pool, 0) == BLOCK
    cache.store(stored[3], pool, 0)
    found = [cache.restore(np.append(text, 9), pool, 0) for text in stored]
    assert found == [BLOCK, 0, BLOCK, BLOCK]
