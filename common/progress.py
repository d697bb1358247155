"""How long work tells where it stands."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, steps done and steps in all."""


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """Tell nobody."""
