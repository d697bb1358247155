"""Prefix reuse: KV rows of prompts and answers, kept by what they were computed from.

Rows are kept in blocks of tokens. A block's key is a hash of its tokens and of the key before it, so a key stands for
the whole text up to its end, and a chain of keys finds the longest known beginning of a prompt: a system prompt that
others have, or the earlier turns of a chat. The last block of a text may be short. Committed rows are causal and free
of the draft adapter in every mode, so they serve all modes. Least recently used blocks go first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.kv.slots import KvSlots, Rows

BLOCK = 32  # tokens

Ints = NDArray[np.int64]


class PrefixCache:
    """KV rows of at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self._limit = limit
        self._blocks: OrderedDict[bytes, Rows] = OrderedDict()

    def restore(self, tokens: Ints, pool: KvSlots, slot: int) -> int:
        """Write the known rows of ``tokens`` into an empty slot; returns how many. The last token is always left: its
        pass gives the logits.
        """
        found: list[Rows] = []
        key = b""
        for chunk, next_key in _chain(tokens):
            if next_key not in self._blocks:
                found += self._short_block(key, chunk)
                break
            found.append(self._touched(next_key))
            key = next_key
        known = min(sum(int(block.shape[2]) for block in found), len(tokens) - 1)
        pool.reserve(known)
        for number, block in enumerate(found):
            start = number * BLOCK
            pool.write_rows(slot, start, block[:, :, : known - start])
        return known

    def store(self, tokens: Ints, pool: KvSlots, slot: int) -> None:
        """Keep the rows of ``tokens``, all of them committed in ``slot``."""
        start = 0
        for chunk, key in _chain(tokens):
            if key in self._blocks:
                self._blocks.move_to_end(key)
            else:
                self._insert(key, pool.read_rows(slot, start, start + len(chunk)))
            start += len(chunk)

    def _short_block(self, key: bytes, chunk: Ints) -> list[Rows]:
        """The longest block that begins as ``chunk`` does and ends a known text."""
        for length in range(len(chunk) - 1, 0, -1):
            if (short := _key(key, chunk[:length])) in self._blocks:
                return [self._touched(short)]
        return []

    def _touched(self, key: bytes) -> Rows:
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _insert(self, key: bytes, rows: Rows) -> None:
        if rows.nbytes > self._limit:
            return
        self._blocks[key] = rows
        self.bytes += rows.nbytes
        while self.bytes > self._limit:
            _, oldest = self._blocks.popitem(last=False)
            self.bytes -= oldest.nbytes


def _chain(tokens: Ints) -> Iterator[tuple[Ints, bytes]]:
    """The blocks of a text and their keys; the last one is as short as what is left."""
    key = b""
    for start in range(0, len(tokens), BLOCK):
        chunk = tokens[start : start + BLOCK]
        key = _key(key, chunk)
        yield chunk, key


def _key(before: bytes, tokens: Ints) -> bytes:
    return hashlib.blake2b(before + np.ascontiguousarray(tokens).tobytes(), digest_size=16).digest()
