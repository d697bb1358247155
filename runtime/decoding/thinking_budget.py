"""The thinking budget: the number of tokens after ``<think>`` at which ``</think>`` is forced."""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

from trimode.common.errors import TriModeError
from trimode.model.tokenizer import Tokenizer


class ThinkingIds(NamedTuple):
    """The tokens that open and close thinking."""

    begin: int
    end: int

    @classmethod
    def find(cls, tokenizer: Tokenizer) -> ThinkingIds | None:
        """None if the vocabulary has none."""
        begin, end = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
        return None if begin is None or end is None else cls(begin, end)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ThinkingIds:
        """Raises TriModeError if the vocabulary has none."""
        ids = cls.find(tokenizer)
        if ids is None:
            raise TriModeError(
                "max_thinking_tokens cannot be honoured: the model's vocabulary has no <think> and </think>"
            )
        return ids

    def leave_open(self, prompt: list[int], thinking: bool | None) -> bool:
        """Whether a prompt ends inside a thought. thinking: whether it does, if that is known; otherwise the last
        ``<think>`` or ``</think>`` decides.
        """
        marks = [token for token in prompt if token in self] if thinking is None else []
        return bool(marks) and marks[-1] == self.begin if thinking is None else thinking


class ThinkingBudget:
    """Counts the tokens after an open ``<think>``, which the prompt or the answer has opened.

    tokens: how many may come before thinking is closed. thinking: as in :meth:`ThinkingIds.leave_open`.
    """

    def __init__(self, tokens: int, ids: ThinkingIds, prompt: list[int], thinking: bool | None = None) -> None:
        self.ids = ids
        self._tokens = tokens
        self._thought = 0
        self._open = ids.leave_open(prompt, thinking)

    @property
    def spent(self) -> bool:
        """Whether the next token must be the end of thinking."""
        return self._open and self._thought >= self._tokens

    def take(self, token: int) -> None:
        """Count an emitted token."""
        if token == self.ids.end:
            self._open = False
        elif self._open:
            self._thought += 1
        elif token == self.ids.begin:
            self._open, self._thought = True, 0

    def ends_among(self, tokens: list[int]) -> list[int]:
        """Indices of the next ``tokens`` at which thinking must end. A mask token counts as a token of the thought."""
        ahead, ends = copy(self), []
        for index, token in enumerate(tokens):
            if ahead.spent:
                ends.append(index)
                ahead.take(self.ids.end)
            else:
                ahead.take(token)
        return ends
