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
_KEPT_MASKS = 64


@dataclass(frozen=True)
class Vocabulary:
    """The model's tokens as llguidance needs them. size: of the model's vocabulary. end_ids: its end tokens."""

    tokenizer: LLTokenizer
    size: int
    end_ids: tuple[int, ...]


@dataclass(slots=True)
class _Place:
    """What is known of a place of the text.

    run: tokens of forced text, of which the one at ``index`` is the only legal token here; empty if nothing is forced,
    None if that is not known yet. complete: whether only an end token may come. ended: whether an end token came.
    """

    run: Sequence[int] | None = None
    index: int = 0
    complete: bool = False
    ended: bool = False
    mask: Words | None = None


class GrammarMatcher:
    """Where one answer is in its grammar. Tokens are taken one after the other, and the latest can be undone.

    Where the grammar forces text, the only legal tokens are those of its usual spelling, as the tokenizer spells the
    whole of it where it begins. End tokens are legal where the grammar may end, and nothing is legal behind them.
    Behind a complete text, the model's first end token is the only legal token. Every method raises GrammarError if the
    grammar exceeds a limit of time or memory here.

    Drafts are taken, undone, and taken again where they are accepted. So undone tokens are remembered until another
    token is taken in their place, and llguidance's matcher follows only when it must say something new.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._path: list[int] = []  # the tokens taken, and behind them those undone
        self._places = [_Place()]  # before each token of the path, and behind the last one
        self._at = 0  # tokens taken
        self._followed = 0  # tokens of the path that llguidance's matcher has consumed
        self._masked = deque[_Place]()  # the latest places whose mask was computed

    @property
    def ended(self) -> bool:
        """Whether an end token was taken."""
        return self._places[self._at].ended

    @property
    def complete(self) -> bool:
        """Whether only an end token may come next."""
        return self._known_place().complete

    @property
    def forced_token(self) -> int | None:
        """The next token where it is the only legal one; None if several are legal, or none."""
        place = self._places[self._at]
        if place.run is None:
            place = self._known_place()
        return place.run[place.index] if place.run else None

    @property
    def forced(self) -> list[int]:
        """The next tokens, if the grammar forces their text. May be empty."""
        place = self._known_place()
        return list(place.run[place.index :]) if place.run else []

    def allows(self, token: int) -> bool:
        if self._at < len(self._path) and token == self._path[self._at]:
            return True
        place = self._known_place()
        if place.run:
            return token == place.run[place.index]
        if place.ended or token >= self._vocabulary.size:
            return False
        self._follow()
        legal = self._matcher.validate_tokens([token]) == 1
        self._require_intact()
        return legal

    def mask(self) -> Words:
        """The legal tokens, as :mod:`trimode.model.step` defines ``token_mask``: [ceil(V / 32)] uint32."""
        place = self._known_place()
        if place.mask is None:
            place.mask = self._mask_of(place)
            self._masked.append(place)
            if len(self._masked) > _KEPT_MASKS:
                self._masked.popleft().mask = None
        return place.mask

    def _mask_of(self, place: _Place) -> Words:
        if place.run or place.ended:
            words = np.zeros(mask_words(self._vocabulary.size), np.uint32)
            if place.run:
                words[place.run[place.index] // 32] = 1 << place.run[place.index] % 32
            return words
        self._follow()
        words = np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: mask_words(self._vocabulary.size)].copy()
        self._require_intact()
        if self._vocabulary.size % 32:
            words[-1] &= (1 << self._vocabulary.size % 32) - 1
        return words

    def take(self, token: int) -> bool:
        """Take a token if it is legal; returns whether it was."""
        if self._at < len(self._path) and token == self._path[self._at]:
            self._at += 1
            return True
        if token in self._vocabulary.end_ids:
            if not self.allows(token):
                return False
            behind = _Place(run=(), ended=True)
        elif run := (place := self._known_place()).run:
            if token != run[place.index]:
                return False
            behind = _Place(run, place.index + 1) if place.index + 1 < len(run) else _Place()
        else:
            if place.ended or token >= self._vocabulary.size:
                return False
            self._follow()
            if not self._matcher.try_consume_tokens([token]):
                self._require_intact()
                return False
            self._followed += 1
            behind = _Place()
        del self._path[self._at :], self._places[self._at + 1 :]
        self._path.append(token)
        self._places.append(behind)
        self._at += 1
        return True

    def undo(self, count: int) -> None:
        """Undo the latest tokens taken."""
        self._at -= count

    def _known_place(self) -> _Place:
        """The place of the next token, with what the grammar forces there."""
        place = self._places[self._at]
        if place.run is None:
            self._follow()
            if self._matcher.is_stopped():
                self._require_intact()
                place.run, place.complete = self._vocabulary.end_ids[:1], True
            else:
                place.run = self._matcher.compute_ff_tokens()
                self._require_intact()
        return place

    def _follow(self) -> None:
        """Bring llguidance's matcher to the tokens taken."""
        if self._followed == self._at:
            return
        if self._followed > self._at:
            self._matcher.rollback(self._followed - self._at)
        else:
            self._matcher.consume_tokens(self._path[self._followed : self._at])
        self._followed = self._at
        self._require_intact()

    def _require_intact(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                "the grammar exceeds the limits of time and memory at this text: "
                + (self._matcher.get_error().splitlines() or ["unknown"])[0]
            )
