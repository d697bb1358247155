"""The KV pool: one buffer a layer for keys and one for values, shared by both engines.

Sequences sit in slots 0 .. n - 1, so a step binds a run of slots without a copy. A freed slot is filled by the last
one. Slots and rows are added by doubling, so that a pass costs about what its true lengths cost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trimode.common.errors import TriModeError
from trimode.runtime.kv.slots import Rows

FIRST_ROWS = 128


class KvPool:
    """``buffers[2 * layer]`` holds keys, ``buffers[2 * layer + 1]`` values: [slots, kv_heads, rows, head_dim] fp32."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, capacity: int, limit: int | None = None) -> None:
        """limit: bytes that the pool may grow to."""
        self.capacity = capacity
        self._limit = limit
        self._layers = layers
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        self.buffers = self._allocate(1, min(FIRST_ROWS, capacity))
        self.active = 0
        # Counts reallocations: who holds addresses of the buffers compares it.
        self.generation = 0

    @property
    def slots(self) -> int:
        return len(self.buffers[0])

    @property
    def rows(self) -> int:
        return int(self.buffers[0].shape[2])

    def fits(self, rows: int) -> bool:
        """Whether a sequence of ``rows`` tokens, alone, stays within the pool's limit, whatever the pool holds now."""
        return self._allowed(1, self._grown(rows))

    def holds(self, sequences: int, rows: int) -> bool:
        """Whether so many sequences, the longest of ``rows`` tokens, stay within the pool's limit now."""
        return self._allowed(_power_of_two(sequences), max(self.rows, self._grown(rows)))

    def acquire(self) -> int:
        """A slot for a new sequence: always the first one past the active ones."""
        if self.active == self.slots:
            self._resize(self.slots * 2, self.rows)
        self.active += 1
        return self.active - 1

    def release(self, slot: int) -> int:
        """Give a slot back. The last active sequence moves into it; returns that sequence's former slot."""
        if not 0 <= slot < self.active:
            raise ValueError(f"slot {slot} is not active; {self.active} are")
        last = self.active - 1
        if slot != last:
            for buffer in self.buffers:
                buffer[slot] = buffer[last]
        self.active = last
        if last == 0 and self.rows > FIRST_ROWS:
            # The next sequence pays for its own length, not for the longest there ever was.
            self._resize(self.slots, FIRST_ROWS)
        return last

    def reserve(self, rows: int) -> None:
        """Make room for sequences of ``rows`` tokens; raises TriModeError past the engine's capacity."""
        if rows > self.capacity:
            raise TriModeError(f"a sequence of {rows} tokens exceeds the engine's capacity of {self.capacity}")
        if rows > self.rows:
            grown = self._grown(rows)
            # Slots of a busier time give way to longer rows.
            slots = self.slots if self._allowed(self.slots, grown) else _power_of_two(max(self.active, 1))
            self._resize(slots, grown)

    def read_rows(self, slot: int, start: int, stop: int) -> Rows:
        """A copy of a sequence's rows from ``start`` to before ``stop``."""
        return np.stack([buffer[slot, :, start:stop] for buffer in self.buffers])

    def write_rows(self, slot: int, start: int, rows: Rows) -> None:
        """Put rows that :meth:`read_rows` gave into a sequence, from ``start`` on; there is room for them."""
        for buffer, part in zip(self.buffers, rows, strict=True):
            buffer[slot, :, start : start + rows.shape[2]] = part

    def _grown(self, rows: int) -> int:
        grown = min(FIRST_ROWS, self.capacity)
        while grown < rows:
            grown *= 2
        return min(grown, self.capacity)

    def _allowed(self, slots: int, rows: int) -> bool:
        values = 2 * self._layers * slots * self._kv_heads * rows * self._head_dim
        return self._limit is None or values * np.dtype(np.float32).itemsize <= self._limit

    def _resize(self, slots: int, rows: int) -> None:
        resized = self._allocate(slots, rows)
        kept = min(rows, self.rows)
        for new, old in zip(resized, self.buffers, strict=True):
            new[: self.active, :, :kept] = old[: self.active, :, :kept]
        self.buffers = resized
        self.generation += 1

    def _allocate(self, slots: int, rows: int) -> list[NDArray[np.float32]]:
        # Zeros, not garbage: rows past a sequence are masked, but 0 times a NaN there would be a NaN.
        shape = (slots, self._kv_heads, rows, self._head_dim)
        return [np.zeros(shape, np.float32) for _ in range(2 * self._layers)]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
