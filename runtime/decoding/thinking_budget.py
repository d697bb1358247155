"""The thinking budget: how many tokens a model may think before its ``<think>`` is closed for it."""

from __future__ import annotations

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
    """Counts the tokens of an open ``<think>``, whether the prompt leaves it open or the model opens it.

    thinking: whether the prompt leaves it open; None: it does if the last mark among its tokens is ``<think>``.
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
        if token in self.ids:
            self._open = token == self.ids.begin
            self._thought = 0
        elif self._open:
            self._thought += 1
