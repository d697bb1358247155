"""Thinking apart from the answer: text inside ``<think>`` and ``</think>`` at an answer's start, as it streams."""

from __future__ import annotations

from typing import NamedTuple

from trimode.model.chat_template import END_THINK, THINK

OPEN, CLOSE = THINK, END_THINK


class Split(NamedTuple):
    reasoning: str
    content: str


class ReasoningSplitter:
    """What :meth:`feed` and :meth:`finish` return, joined, is the text without the marks around its one thought.

    A piece of text that may yet prove to be a mark is held back.
    """

    def __init__(self, thinking: bool) -> None:
        # The mark that ends the present part; None once the answer itself has begun.
        self._mark: str | None = CLOSE if thinking else OPEN
        self._held = ""

    def feed(self, text: str) -> Split:
        self._held += text
        reasoning = ""
        if self._mark == OPEN:
            if self._held.startswith(OPEN):
                self._mark, self._held = CLOSE, self._held.removeprefix(OPEN)
            elif not OPEN.startswith(self._held):
                self._mark = None
        if self._mark == CLOSE:
            reasoning, closed, rest = self._held.partition(CLOSE)
            if closed:
                self._mark, self._held = None, rest
            else:
                kept = _possible_mark(reasoning)
                self._held = reasoning[len(reasoning) - kept :]
                reasoning = reasoning[: len(reasoning) - kept]
        content = ""
        if self._mark is None:
            content, self._held = self._held, ""
        return Split(reasoning, content)

    def finish(self) -> Split:
        held, self._held = self._held, ""
        return Split(held, "") if self._mark == CLOSE else Split("", held)


def _possible_mark(text: str) -> int:
    """Characters at the end of ``text`` that ``CLOSE`` begins with."""
    return next(length for length in range(len(CLOSE) - 1, -1, -1) if text.endswith(CLOSE[:length]))
