"""Prefix reuse: KV rows of earlier prompts and answers, kept by the text that they were computed from.

Rows are kept in blocks of BLOCK tokens. A block's key is a hash of its tokens and of the key before it, so a key stands
for the whole text up to the block's end, and a chain of keys finds the longest known beginning of a prompt: a shared
system prompt, or the earlier turns of a chat. The last block of a text may be short. Committed rows are causal and do
not use the draft adapter in any mode, so they serve all modes.

Blocks are evicted least recently used first, and a chain from its tail: each use of a chain counts as a use of its
blocks from the last to the first, so a block is always older than the one before it. Blocks that were reused are kept
apart from blocks that were only stored (a segmented LRU): prompts that never come again cannot evict a system prompt.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.kv.slots import KvSlots, Rows

log = logging.getLogger(__name__)

BLOCK = 32  # tokens
REUSED_SHARE = 0.75  # of the limit, for blocks that were reused

Ints = NDArray[np.int64]


class BlockStored(NamedTuple):
    """A block is in the cache. parent: key of the block before it, None for a text's first block."""

    key: bytes
    parent: bytes | None
    tokens: tuple[int, ...]


class BlockRemoved(NamedTuple):
    """A block was evicted."""

    key: bytes


BlockListener = Callable[[BlockStored | BlockRemoved], None]


class PrefixCache:
    """Holds KV rows of at most ``limit_bytes``.

    listener: called for each block that is stored or evicted, on the scheduler's thread. An exception that it raises is
    logged.
    """

    def __init__(self, limit_bytes: int, listener: BlockListener | None = None) -> None:
        self.bytes = 0
        self._limit = limit_bytes
        self._listener = listener
        # Least recently used first. A block is in one of the two.
        self._stored: OrderedDict[bytes, Rows] = OrderedDict()
        self._reused: OrderedDict[bytes, Rows] = OrderedDict()
        self._reused_bytes = 0

    def restore(self, tokens: Ints, pool: KvSlots, slot: int) -> int:
        """Write the known rows of ``tokens`` into an empty slot and return their number.

        The last token is never restored, since its pass gives the first logits.
        """
        chain: list[bytes] = []
        previous = b""
        for chunk, key in _chain(tokens):
            if not self._holds(key):
                chain += self._short_block(previous, chunk)
                break
            chain.append(key)
            previous = key
        blocks = [self._rows(key) for key in chain]
        known = min(sum(int(rows.shape[2]) for rows in blocks), len(tokens) - 1)
        pool.reserve(known)
        for number, rows in enumerate(blocks):
            start = number * BLOCK
            pool.write_rows(slot, start, rows[:, :, : known - start])
        for key in reversed(chain):
            self._mark_reused(key)
        self._limit_reused()
        return known

    def store(self, tokens: Ints, pool: KvSlots, slot: int) -> None:
        """Keep the rows of ``tokens``, all of which are committed in ``slot``, from the first block on as far as there
        is room.
        """
        chain: list[bytes] = []
        start = 0
        for chunk, key in _chain(tokens):
            if not self._holds(key):
                rows = pool.read_rows(slot, start, start + len(chunk))
                if not self._make_room(rows.nbytes, frozenset(chain)):
                    break
                self._stored[key] = rows
                self.bytes += rows.nbytes
                self._notify(BlockStored(key, chain[-1] if chain else None, tuple(chunk.tolist())))
            chain.append(key)
            start += len(chunk)
        for key in reversed(chain):
            (self._reused if key in self._reused else self._stored).move_to_end(key)

    def _holds(self, key: bytes) -> bool:
        return key in self._stored or key in self._reused

    def _rows(self, key: bytes) -> Rows:
        return self._stored[key] if key in self._stored else self._reused[key]

    def _short_block(self, previous: bytes, chunk: Ints) -> list[bytes]:
        """The longest block that ends a known text and with which ``chunk`` begins."""
        for length in range(len(chunk) - 1, 0, -1):
            if self._holds(short := _key(previous, chunk[:length])):
                return [short]
        return []

    def _make_room(self, size: int, needed: frozenset[bytes]) -> bool:
        """Evict blocks that were never reused, except the ``needed`` ones, until ``size`` bytes are free."""
        while self.bytes + size > self._limit:
            key = next((key for key in self._stored if key not in needed), None)
            if key is None:
                return False
            self.bytes -= self._stored.pop(key).nbytes
            self._notify(BlockRemoved(key))
        return True

    def _mark_reused(self, key: bytes) -> None:
        if key in self._stored:
            rows = self._stored.pop(key)
            self._reused[key] = rows
            self._reused_bytes += rows.nbytes
        self._reused.move_to_end(key)

    def _limit_reused(self) -> None:
        """Return the least recently reused blocks to the others, of which they are then the newest."""
        while self._reused_bytes > REUSED_SHARE * self._limit:
            key, rows = self._reused.popitem(last=False)
            self._reused_bytes -= rows.nbytes
            self._stored[key] = rows

    def _notify(self, event: BlockStored | BlockRemoved) -> None:
        if self._listener is None:
            return
        try:
            self._listener(event)
        except Exception:
            log.exception("the listener of the prefix cache failed")


def _chain(tokens: Ints) -> Iterator[tuple[Ints, bytes]]:
    """The blocks of a text and their keys; the last block holds the tokens that are left."""
    key = b""
    for start in range(0, len(tokens), BLOCK):
        chunk = tokens[start : start + BLOCK]
        key = _key(key, chunk)
        yield chunk, key


def _key(previous: bytes, tokens: Ints) -> bytes:
    return hashlib.blake2b(previous + np.ascontiguousarray(tokens).tobytes(), digest_size=16).digest()
