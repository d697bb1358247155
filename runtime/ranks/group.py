"""The interface through which the ranks of a pass add up their partial sums."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Group(Protocol):
    """The ranks of an engine, seen by one of them. All ranks make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    def gathered(self, item: bytes) -> list[bytes]:
        """All ranks' items, which have one length, by rank."""
        ...

    def total(self, partial: NDArray[np.float32]) -> NDArray[np.float32]:
        """The sum of all ranks' arrays, which have one shape. It is added in the order of ranks, so that every rank has
        the same bits, whatever the timing.
        """
        ...
