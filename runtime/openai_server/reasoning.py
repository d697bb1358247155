"""Splits an answer into its reasoning, between ``<think>`` and ``</think>`` at the start, and its content."""

from __future__ import annotations

from typing import NamedTuple

from trimode.model.chat_template import END_THINK, THINK
from trimode.runtime.openai_server.partial_marks import partial_mark

OPEN, CLOSE = THINK, END_THINK


class Split(NamedTuple):
    reasoning: str
    content: str


class ReasoningSplitter:
    """Splits a text that arrives in pieces. The joined results of :meth:`feed` and :meth:`finish` are the text without
    the marks. The end of a piece that may be the beginning of a mark is held back.

    thinking: the prompt ends inside a thought.
    """

    def __init__(self, thinking: bool) -> None:
        # The mark that ends the current part; None in the content.
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
                kept = partial_mark(reasoning, CLOSE)
                self._held = reasoning[len(reasoning) - kept :]
                reasoning = reasoning[: len(reasoning) - kept]
        content = ""
        if self._mark is None:
            content, self._held = self._held, ""
        return Split(reasoning, content)

    def finish(self) -> Split:
        held, self._held = self._held, ""
        return Split(held, "") if self._mark == CLOSE else Split("", held)
