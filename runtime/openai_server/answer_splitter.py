"""Splits an answer into its reasoning, its content and its tool calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from trimode.runtime.openai_server.reasoning import ReasoningSplitter
from trimode.runtime.openai_server.tools.call_splitter import CallDelta, CallSplitter


@dataclass
class AnswerPiece:
    """What an update adds. In this order: reasoning, content, calls."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def add(self, other: AnswerPiece) -> None:
        self.reasoning += other.reasoning
        self.content += other.content
        self.calls += other.calls


class Call(NamedTuple):
    """arguments: JSON text."""

    name: str
    arguments: str


class WholeAnswer(NamedTuple):
    reasoning: str
    content: str
    calls: list[Call]


class AnswerSplitter:
    """For one answer. thinking: the prompt ends inside a thought. calls: None if the answer cannot have calls."""

    def __init__(self, thinking: bool, calls: CallSplitter | None) -> None:
        self._reasoning = ReasoningSplitter(thinking)
        self._calls = calls

    @property
    def has_calls(self) -> bool:
        return self._calls is not None and self._calls.calls > 0

    def feed(self, text: str) -> AnswerPiece:
        reasoning, content = self._reasoning.feed(text)
        return self._piece(reasoning, content)

    def finish(self) -> AnswerPiece:
        reasoning, content = self._reasoning.finish()
        piece = self._piece(reasoning, content)
        if self._calls is not None:
            piece.content += self._calls.finish().content
        return piece

    def whole(self, text: str) -> WholeAnswer:
        """A call that was cut off is content; behind complete calls it is left out."""
        piece = self.feed(text)
        piece.add(self.finish())
        calls: list[Call] = []
        for delta in piece.calls:
            if delta.name is not None:
                calls.append(Call(delta.name, ""))
            calls[delta.number] = Call(calls[delta.number].name, calls[delta.number].arguments + delta.arguments)
        unfinished = self._calls.unfinished if self._calls is not None else ""
        if unfinished:
            calls.pop()
            piece.content += "" if calls else unfinished
        return WholeAnswer(piece.reasoning, piece.content, calls)

    def _piece(self, reasoning: str, content: str) -> AnswerPiece:
        if self._calls is None:
            return AnswerPiece(reasoning, content)
        split = self._calls.feed(content)
        return AnswerPiece(reasoning, split.content, split.calls)
