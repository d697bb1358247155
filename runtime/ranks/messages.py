"""What the scheduler's process and the ranks send each other, pickled, over one socket for each rank.

The socket is a pair that the scheduler's process made, so only these processes can write to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from trimode.common.errors import TriModeError


class Budget(Protocol):
    """What a rank's KV pool can hold."""

    def most_rows(self, sequences: int) -> int:
        """The most rows that each of ``sequences`` sequences can have when they run together."""
        ...


class Load(NamedTuple):
    """The first message to a rank: load its part of an engine. threads, kv_cache_bytes: of this rank."""

    engine: Path
    ranks: int
    threads: int
    kv_cache_bytes: int | None


class Loaded(NamedTuple):
    """The answer to :class:`Load`."""

    budget: Budget
    row_bytes: int
    limit_bytes: int | None


class Call(NamedTuple):
    """A call of the executor or of its pool. All ranks receive the same calls in the same order, except that
    ``write_rows`` has each rank's own rows.
    """

    name: Literal["run", "acquire", "release", "reserve", "read_rows", "write_rows", "move_rows"]
    arguments: tuple[Any, ...]


class Answer(NamedTuple):
    """The result of a call, or the error that it raised. slots: of the rank's pool after it."""

    value: Any
    slots: int
    error: TriModeError | None = None
