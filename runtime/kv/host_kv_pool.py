"""The host's KV pool: one buffer of keys and one of values for each layer, shared by both engines.

Every buffer is one contiguous array [slots, kv_heads, rows, head_dim], so that a pass binds neighbouring slots without
a copy. A pass reads all rows of its slots, so rows grow in small steps, by an eighth, and are given up behind a long
sequence. Slots grow by doubling. Near the limit, both grow exactly as needed.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.common.errors import TriModeError
from trimode.runtime.kv.slots import Rows

FIRST_ROWS = 128
_ROW_UNIT = 32


class KvBudget(NamedTuple):
    """rows: of all slots together, None for no limit. Others as in :class:`KvPool`."""

    capacity: int
    rows: int | None
    spare_rows: int

    def most_rows(self, sequences: int) -> int:
        """The most rows that each of ``sequences`` sequences can have when they run together."""
        if self.rows is None:
            return self.capacity
        return min(self.capacity, self.rows // max(sequences, 1) - self.spare_rows)

    def fits(self, slots: int, rows: int) -> bool:
        """Whether so many slots can have so many rows each."""
        return self.rows is None or slots * (rows + self.spare_rows) <= self.rows


class KvPool:
    """``buffers[2 * layer]`` holds keys, ``buffers[2 * layer + 1]`` values: [slots, kv_heads, rows, head_dim] fp32.

    capacity: the most rows of a sequence. limit_bytes: the most bytes of all buffers together, None for no limit.
    spare_rows: rows of a slot behind those that a sequence may have; the padding of a pass may be written there.
    generation: counts reallocations, after which the buffers have other addresses.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        limit_bytes: int | None = None,
        spare_rows: int = 0,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.row_bytes = 2 * layers * kv_heads * head_dim * np.dtype(np.float32).itemsize
        self.active = 0
        self.generation = 0
        self._capacity = capacity
        self._spare_rows = spare_rows
        most_rows = None if limit_bytes is None else limit_bytes // self.row_bytes
        self.budget = KvBudget(capacity, most_rows, spare_rows)
        self._layers = layers
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        if self.most_rows(1) < 1:
            raise TriModeError(
                f"kv_cache_bytes is {limit_bytes}, but one token's keys and values take "
                f"{(1 + spare_rows) * self.row_bytes} bytes; raise it"
            )
        self.buffers = self._allocate(1, min(FIRST_ROWS, self.most_rows(1)))

    @property
    def slots(self) -> int:
        return len(self.buffers[0])

    @property
    def rows(self) -> int:
        """Rows of every slot that a sequence may have."""
        return int(self.buffers[0].shape[2]) - self._spare_rows

    def most_rows(self, sequences: int) -> int:
        """The most rows that each of ``sequences`` sequences can have when they run together."""
        return self.budget.most_rows(sequences)

    def acquire(self, rows: int | None = None) -> int:
        """Activate the first slot past the active ones and return its number.

        rows: the most that any sequence will need from now on, at most ``most_rows(active + 1)``; None for as many as
        there are.
        """
        if self.active == self.slots:
            slots = 2 * self.slots
            if self._fits(slots, self.rows):
                self._resize(slots, self.rows)
            else:
                kept = self.rows if rows is None else min(self.rows, rows)
                while not self._fits(slots, kept):
                    slots -= 1
                self._require(slots > self.active, self.active + 1, kept)
                self._resize(slots, kept)
        self.active += 1
        return self.active - 1

    def release(self, slot: int, rows: int | None = None) -> int:
        """Free a slot. The last active sequence moves into it; returns that sequence's former slot.

        rows: the most rows that one of the other sequences has, None for all rows. If they need less than half of the
        rows that there are, rows are given up.
        """
        if not 0 <= slot < self.active:
            raise ValueError(f"slot {slot} is not active; {self.active} are")
        last = self.active - 1
        if slot != last:
            for buffer in self.buffers:
                buffer[slot] = buffer[last]
        self.active = last
        needed = 0 if last == 0 else self.rows if rows is None else rows
        kept = max(FIRST_ROWS, _with_room(needed))
        if 2 * kept <= self.rows or (last == 0 and kept < self.rows):
            # Do not let one long sequence slow down the short ones after it.
            self._resize(self.slots, kept)
        return last

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in every active slot; raises TriModeError past ``most_rows(active)``."""
        if rows <= self.rows:
            return
        if rows > self._capacity:
            raise TriModeError(f"a sequence of {rows} tokens exceeds the engine's capacity of {self._capacity}")
        self._require(rows <= self.most_rows(self.active), self.active, rows)
        grown = min(_with_room(rows), self.most_rows(self.active))
        slots = self.slots
        while not self._fits(slots, grown):  # free slots give way to longer rows
            slots -= 1
        self._resize(slots, grown)

    def read_rows(self, slot: int, start: int, stop: int) -> Rows:
        """A copy of a sequence's rows ``start`` to ``stop`` - 1."""
        return np.stack([buffer[slot, :, start:stop] for buffer in self.buffers])

    def move_rows(self, slot: int, start: int, sources: Many[int]) -> None:
        """Copy a sequence's rows ``sources`` to rows ``start``, ``start`` + 1, ... Sources ascend, and none lies before
        the row that it is copied to.
        """
        for buffer in self.buffers:
            buffer[slot, :, start : start + len(sources)] = buffer[slot][:, sources]

    def write_rows(self, slot: int, start: int, rows: Rows) -> None:
        """Write rows from :meth:`read_rows` into a sequence, beginning at row ``start``; they must be reserved."""
        for buffer, part in zip(self.buffers, rows, strict=True):
            buffer[slot, :, start : start + rows.shape[2]] = part

    def _fits(self, slots: int, rows: int) -> bool:
        return self.budget.fits(slots, rows)

    def _require(self, holds: bool, sequences: int, rows: int) -> None:
        if not holds:
            raise TriModeError(
                f"{sequences} sequences of {rows} tokens exceed kv_cache_bytes of {self.limit_bytes}, which allows "
                f"{self.most_rows(sequences)} tokens each"
            )

    def _resize(self, slots: int, rows: int) -> None:
        """Zeroed memory takes no room before it is written, so old and new buffers together stay near the limit."""
        resized = self._allocate(slots, rows)
        kept = min(rows, self.rows)
        for index, new in enumerate(resized):
            new[: self.active, :, :kept] = self.buffers[index][: self.active, :, :kept]
            self.buffers[index] = new
        self.generation += 1

    def _allocate(self, slots: int, rows: int) -> list[NDArray[np.float32]]:
        # Zeros: rows past a sequence are masked, but 0 times a NaN would be a NaN.
        shape = (slots, self._kv_heads, rows + self._spare_rows, self._head_dim)
        return [np.zeros(shape, np.float32) for _ in range(2 * self._layers)]


def _with_room(rows: int) -> int:
    """An eighth more, so that not every pass of a growing sequence reallocates."""
    return -(-(rows + rows // 8) // _ROW_UNIT) * _ROW_UNIT
