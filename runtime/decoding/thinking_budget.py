"""The thinking budget: the number of tokens behind ``<think>`` after which ``</think>`` is forced."""

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
    def of(cls, tokenizer: Tokenizer) -> ThinkingIds:
        """Raises TriModeError if the vocabulary has none."""
        begin, end = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
        if begin is None or end is None:
            raise TriModeError(
                "max_thinking_tokens cannot be honoured: the model's vocabulary has no <think> and </think>"
            )
        return cls(begin, end)


class ThinkingBudget:
    """Counts the tokens behind an open ``<think>``, whether the prompt or the answer opened it.

    tokens: how many may come before thinking is closed. thinking: whether the prompt leaves it open; None: it does if
    the last mark among the prompt's tokens is ``<think>``.
    """

    def __init__(self, tokens: int, ids: ThinkingIds, prompt: list[int], thinking: bool | None = None) -> None:
        self.ids = ids
        self._tokens = tokens
        self._thought = 0
        marks = [token for token in prompt if token in ids]
        self._open = bool(marks) and marks[-1] == ids.begin if thinking is None else thinking

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

    def runs_out_at(self, tokens: list[int]) -> int | None:
        """Index of the first of the next ``tokens`` at which the budget is spent. A mask counts as a thought."""
        ahead = copy(self)
        for index, token in enumerate(tokens):
            if ahead.spent:
                return index
            ahead.take(token)
        return None
