"""Matches the tokens of one answer against a compiled grammar: which tokens may come next, and which must."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from trimode.model.step import mask_words
from trimode.runtime.request.errors import GrammarError

Words = NDArray[np.uint32]
_REMEMBERED = 64  # tokens


@dataclass(frozen=True)
class Vocabulary:
    """The model's tokens as llguidance needs them. size: of the model's vocabulary. end_ids: its end tokens."""

    tokenizer: LLTokenizer
    size: int
    end_ids: tuple[int, ...]


@dataclass(slots=True)
class _Place:
    """What is known of a place of the text: the tokens forced there, and the mask."""

    forced: list[int] | None = None
    mask: Words | None = None


class GrammarMatcher:
    """Where one answer is in its grammar. Tokens are taken one after the other, and the latest can be undone.

    Where the grammar forces the text, the one legal token is the first of its usual spelling: the one that the
    tokenizer would give. End tokens are legal where the grammar may end, and nothing is legal behind them. Behind a
    complete text, the model's first end token is the one legal token. Every method raises GrammarError if the grammar
    exceeds a limit of time or memory here.

    Drafts are taken, undone and taken again, so what is known of their places is kept until another token is taken.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self.ended = False  # by an end token
        self._place = _Place()
        self._taken = deque[tuple[int, _Place]](maxlen=_REMEMBERED)  # the latest tokens, each with the place before it
        self._ahead: list[tuple[int, _Place]] = []  # undone tokens, the next one last, each with the place behind it

    @property
    def complete(self) -> bool:
        """Whether only end tokens may come next."""
        if self.ended or not self._matcher.is_stopped():
            return False
        self._require_intact()
        return True

    def allows(self, token: int) -> bool:
        if self._ahead and token == self._ahead[-1][0]:
            return True
        if forced := self.forced():
            return token == forced[0]
        if self.ended or token >= self._vocabulary.size:
            return False
        legal = self._matcher.validate_tokens([token]) == 1
        self._require_intact()
        return legal

    def mask(self) -> Words:
        """The legal tokens, as :mod:`trimode.model.step` defines ``token_mask``: [ceil(V / 32)] uint32."""
        if self._place.mask is None:
            self._place.mask = self._mask_here()
        return self._place.mask

    def _mask_here(self) -> Words:
        if self.ended:
            return np.zeros(mask_words(self._vocabulary.size), np.uint32)
        if self.complete:
            end = self._vocabulary.end_ids[0]
            words = np.zeros(mask_words(self._vocabulary.size), np.uint32)
            words[end // 32] = 1 << end % 32
            return words
        words = np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: mask_words(self._vocabulary.size)].copy()
        self._require_intact()
        if self._vocabulary.size % 32:
            words[-1] &= (1 << self._vocabulary.size % 32) - 1
        return words

    def take(self, token: int) -> bool:
        """Take a token if it is legal; returns whether it was."""
        if not self.allows(token):
            return False
        self._taken.append((token, self._place))
        if self._ahead and token == self._ahead[-1][0]:
            self._place = self._ahead.pop()[1]
        else:
            self._ahead.clear()
            self._place = _Place()
        if token in self._vocabulary.end_ids:
            self.ended = True
        else:
            self._matcher.consume_token(token)
            self._require_intact()
        return True

    def undo(self, tokens: Sequence[int]) -> None:
        """Undo the latest tokens taken, which were these."""
        for _ in tokens:
            if not self._taken:  # forgotten
                self._ahead.clear()
                self._place = _Place()
                break
            token, before = self._taken.pop()
            self._ahead.append((token, self._place))
            self._place = before
        consumed = len(tokens)
        if tokens and self.ended:
            self.ended = False
            consumed -= 1
        if consumed:
            self._matcher.rollback(consumed)
            self._require_intact()

    def forced(self) -> list[int]:
        """The next tokens, if the grammar forces their text. May be empty."""
        if self._place.forced is None:
            self._place.forced = self._forced_here()
        return self._place.forced

    def _forced_here(self) -> list[int]:
        if self.ended:
            return []
        if self.complete:
            return list(self._vocabulary.end_ids[:1])
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._require_intact()
        return tokens

    def _require_intact(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                "the grammar exceeds the limits of time and memory at this text: "
                + (self._matcher.get_error().splitlines() or ["unknown"])[0]
            )
