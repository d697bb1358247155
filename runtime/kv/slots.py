"""The interface of a KV pool: one slot for each running sequence, on a host or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.generic]  # [2 * layers, kv_heads, rows, head_dim] of one sequence


class KvSlots(Protocol):
    """KV memory. The running sequences occupy slots 0 .. ``active`` - 1."""

    active: int

    @property
    def slots(self) -> int:
        """Slots that are allocated."""
        ...

    @property
    def limit_bytes(self) -> int | None:
        """The most bytes that the pool may take; None if nothing limits it."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values, over all layers."""
        ...

    def most_rows(self, sequences: int) -> int:
        """The most rows that each of ``sequences`` sequences can have when they run together; 0 if so many cannot run.

        This is the whole KV budget: admission, padding and the context length follow from it. Callable from any thread.
        """
        ...

    def acquire(self, rows: int | None = None) -> int:
        """Activate the first slot past the active ones and return its number.

        rows: the most that any sequence will need from now on, at most ``most_rows(active + 1)``; None for as many as
        there are. Memory that no sequence needs may be given up for the slot.
        """
        ...

    def release(self, slot: int, rows: int | None = None) -> int:
        """Free a slot. The last active sequence moves into it; returns that sequence's former slot.

        rows: the most rows that one of the other sequences has. Memory beyond may be given up. None for all rows.
        """
        ...

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in every active slot; raises TriModeError past ``most_rows(active)``."""
        ...

    def read_rows(self, slot: int, start: int, stop: int) -> Rows:
        """A copy of a sequence's rows ``start`` to ``stop`` - 1."""
        ...

    def move_rows(self, slot: int, start: int, sources: Many[int]) -> None:
        """Copy a sequence's rows ``sources`` to rows ``start``, ``start`` + 1, ... Sources ascend, and none lies before
        the row that it is copied to.
        """
        ...

    def write_rows(self, slot: int, start: int, rows: Rows) -> None:
        """Write rows from :meth:`read_rows` into a sequence, beginning at row ``start``; they must be reserved."""
        ...
