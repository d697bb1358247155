"""The interface of KV memory: slots of one sequence each, whatever holds them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.generic]  # [2 * layers, kv_heads, rows, head_dim] of one sequence


class KvSlots(Protocol):
    """KV memory for sequences of at most ``capacity`` tokens: they sit in slots 0 .. ``active`` - 1."""

    capacity: int
    active: int

    @property
    def slots(self) -> int:
        """How many are allocated."""
        ...

    def fits(self, rows: int) -> bool:
        """Whether there may ever be a sequence of ``rows`` tokens. Any thread may ask."""
        ...

    def holds(self, sequences: int, rows: int) -> bool:
        """Whether there may be so many sequences now, the longest of ``rows`` tokens."""
        ...

    def acquire(self) -> int:
        """A slot for a new sequence: always the first one past the active ones."""
        ...

    def release(self, slot: int) -> int:
        """Give a slot back. The last active sequence moves into it; returns that sequence's former slot."""
        ...

    def reserve(self, rows: int) -> None:
        """Make room for sequences of ``rows`` tokens; raises TriModeError past the engine's capacity."""
        ...

    def read_rows(self, slot: int, start: int, stop: int) -> Rows:
        """A copy of a sequence's rows from ``start`` to before ``stop``."""
        ...

    def write_rows(self, slot: int, start: int, rows: Rows) -> None:
        """Put rows that :meth:`read_rows` gave into a sequence, from ``start`` on; there is room for them."""
        ...
