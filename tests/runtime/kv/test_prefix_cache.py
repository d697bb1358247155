"""Prefix reuse compared with a plain search for the longest known beginning, and eviction compared with a model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from trimode.runtime.kv.host_kv_pool import KvPool
from trimode.runtime.kv.prefix_cache import BLOCK, BlockRemoved, BlockStored, PrefixCache

LAYERS, CAPACITY = 2, 400
BLOCK_BYTES = BLOCK * 2 * LAYERS * 4


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
def test_it_stays_within_its_limit(known: list[np.ndarray], blocks: int) -> None:
    limit = blocks * BLOCK_BYTES
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
    cache = PrefixCache(3 * BLOCK_BYTES)
    stored = [np.full(BLOCK, token) for token in range(4)]
    for text in stored[:3]:
        fill(pool, 0, text)
        cache.store(text, pool, 0)
    assert cache.restore(np.append(stored[0], 9), pool, 0) == BLOCK
    cache.store(stored[3], pool, 0)
    found = [cache.restore(np.append(text, 9), pool, 0) for text in stored]
    assert found == [BLOCK, 0, BLOCK, BLOCK]


def test_whole_blocks_of_32_tokens_are_reused() -> None:
    cache = Cache(blocks=9)
    cache.store(np.arange(100))
    for common, reused in ((31, 0), (32, 32), (63, 32), (64, 64), (100, 100)):
        prompt = np.append(np.arange(common), [500, 501])
        assert cache.cache.restore(prompt, cache.pool, 0) == reused
    assert cache.cache.restore(np.arange(64), cache.pool, 0) == 63  # the last token gives the first logits
    assert cache.cache.restore(np.arange(1), cache.pool, 0) == 0


class Cache:
    """A cache of so many blocks, over one slot."""

    def __init__(self, blocks: int) -> None:
        self.events: list[BlockStored | BlockRemoved] = []
        self.cache = PrefixCache(blocks * BLOCK_BYTES, self.events.append)
        self.pool = KvPool(LAYERS, 1, 1, CAPACITY)
        self.pool.acquire()

    def store(self, text: np.ndarray) -> None:
        fill(self.pool, 0, text)
        self.cache.store(text, self.pool, 0)

    def known(self, text: np.ndarray) -> int:
        """Blocks of the text that are restored."""
        return self.cache.restore(np.append(text, 99), self.pool, 0) // BLOCK


def chain(blocks: int, token: int = 1) -> np.ndarray:
    return np.full(blocks * BLOCK, token)


def test_a_text_loses_its_tail_first() -> None:
    cache = Cache(blocks=10)
    cache.store(chain(10))
    cache.store(chain(11))  # one more block does not evict the ten before it
    assert cache.known(chain(11)) == 10
    cache = Cache(blocks=10)
    cache.store(chain(10))
    for other in range(2, 5):
        cache.store(chain(1, other))
    assert cache.known(chain(10)) == 7


def test_prompts_that_never_come_again_do_not_evict_a_reused_one() -> None:
    cache = Cache(blocks=10)
    cache.store(chain(6))
    assert cache.known(chain(6)) == 6
    for other in range(2, 9):
        cache.store(chain(10, other))
    assert cache.known(chain(6)) == 6
    assert cache.known(chain(10, 8)) == 4


def test_reused_blocks_may_fill_their_share_exactly() -> None:
    cache = Cache(blocks=4)  # three of them for reused blocks
    cache.store(chain(3))
    assert cache.known(chain(3)) == 3
    cache.store(chain(2, 2))
    assert cache.known(chain(3)) == 3


def test_blocks_that_are_no_longer_reused_give_way() -> None:
    cache = Cache(blocks=8)  # six of them for reused blocks
    cache.store(chain(6))
    assert cache.known(chain(6)) == 6
    cache.store(chain(2, token=2))
    assert cache.known(chain(2, token=2)) == 2
    cache.store(chain(2, token=3))  # the first text's tail gives way
    assert cache.known(chain(6)) == 4


def test_every_block_stored_and_removed_is_reported() -> None:
    cache = Cache(blocks=2)
    cache.store(np.arange(BLOCK + 3))
    first, second = cache.events
    assert isinstance(first, BlockStored)
    assert isinstance(second, BlockStored)
    assert (first.parent, first.tokens) == (None, tuple(range(BLOCK)))
    assert (second.parent, second.tokens) == (first.key, tuple(range(BLOCK, BLOCK + 3)))
    cache.store(np.arange(100, 100 + BLOCK))
    removed, stored = cache.events[2:]
    assert removed == BlockRemoved(second.key)
    assert isinstance(stored, BlockStored)


def test_a_listener_that_fails_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(blocks=2)

    def fail(_: object) -> None:
        raise ZeroDivisionError

    cache.cache = PrefixCache(2 * BLOCK_BYTES, fail)
    cache.store(chain(2))
    assert cache.known(chain(2)) == 2
    assert "the listener of the prefix cache failed" in caplog.text


class AgainstModel(RuleBasedStateMachine):
    """Chains of blocks against a plain model: an ordered list of texts (tuples of block contents), oldest first, with a
    mark on those that were reused.
    """

    LIMIT = 8

    @initialize()
    def start(self) -> None:
        self.cache = Cache(blocks=self.LIMIT)
        self.order: list[tuple[int, ...]] = []
        self.reused: list[tuple[int, ...]] = []

    texts = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)

    @rule(text=texts)
    def store(self, text: tuple[int, ...]) -> None:
        self.cache.store(np.repeat(text, BLOCK))
        mine: list[tuple[int, ...]] = []
        for end in range(1, len(text) + 1):
            block = text[:end]
            if block not in self.order + self.reused:
                others = [other for other in self.order if other not in mine]
                if len(self.order) + len(self.reused) == self.LIMIT:
                    if not others:
                        break
                    self.order.remove(others[0])
                self.order.append(block)
            mine.append(block)
        self.touch(mine)

    @rule(text=texts)
    def restore(self, text: tuple[int, ...]) -> None:
        known = 0
        while text[: known + 1] in self.order + self.reused and known < len(text):
            known += 1
        assert self.cache.known(np.repeat(text, BLOCK)) == known
        mine = [text[:end] for end in range(1, known + 1)]
        for block in reversed(mine):
            if block in self.order:
                self.order.remove(block)
                self.reused.append(block)
        self.touch(mine)
        while len(self.reused) > 0.75 * self.LIMIT:
            self.order.append(self.reused.pop(0))

    def touch(self, mine: list[tuple[int, ...]]) -> None:
        for block in reversed(mine):
            queue = self.reused if block in self.reused else self.order
            queue.remove(block)
            queue.append(block)

    @invariant()
    def no_block_is_kept_without_those_before_it(self) -> None:
        held = self.order + self.reused
        assert all(block[:-1] in held for block in held if len(block) > 1)

    @invariant()
    def the_limit_is_kept_and_events_match_what_is_held(self) -> None:
        held: set[bytes] = set()
        for event in self.cache.events:
            if isinstance(event, BlockStored):
                assert event.parent is None or event.parent in held
                held.add(event.key)
            else:
                held.remove(event.key)
        assert len(held) == len(self.order) + len(self.reused) <= self.LIMIT
        assert self.cache.cache.bytes == len(held) * BLOCK_BYTES


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
