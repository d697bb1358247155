"""The callback by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, the number of steps done, and the total."""


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """Report nothing."""
