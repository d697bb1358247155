"""Marks in a text that arrives in pieces."""

from __future__ import annotations


def partial_mark(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` with which ``mark`` begins, without being all of it."""
    longest = min(len(mark) - 1, len(text))
    return next(length for length in range(longest, -1, -1) if text.endswith(mark[:length]))
