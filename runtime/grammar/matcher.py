"""Matches the tokens of one answer against a compiled grammar: which tokens may come next, and which must."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from trimode.model.step import mask_words
from trimode.runtime.request.errors import GrammarError

Words = NDArray[np.uint32]
_KEPT_MASKS = 64
_NOWHERE = -1
_FREE = -1  # of a place, instead of a token: the grammar forces none


@dataclass(frozen=True)
class Vocabulary:
    """The model's tokens as llguidance needs them. size: of the model's vocabulary. end_ids: its end tokens."""

    tokenizer: LLTokenizer
    size: int
    end_ids: tuple[int, ...]


class GrammarMatcher:
    """Where one answer is in its grammar. Tokens are taken one after the other, and the latest can be undone.

    Where the grammar forces text, the only legal tokens are those of its usual spelling, as the tokenizer spells the
    whole of it where it begins. End tokens are legal where the grammar may end, and nothing is legal after them.
    Behind a complete text, the model's first end token is the only legal token. Every method raises GrammarError if the
    grammar exceeds a limit of time or memory here.

    Drafts are taken, undone, and taken again where they are accepted. So undone tokens are remembered until another
    token is taken in their place, and llguidance's matcher follows only when it must say something new.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._path: list[int] = []  # the tokens taken, and after them those undone
        self._at = 0  # tokens taken; also the place of the text before the next token
        self._followed = 0  # tokens of the path that llguidance's matcher has consumed
        # By place, as far as it is known: the only legal token where the grammar forces text, else _FREE.
        self._forced: list[int] = []
        self._complete_at = _NOWHERE  # the place where only an end token may come
        self._ended_at = _NOWHERE  # the place after an end token
        self._masks: dict[int, Words] = {}  # by place, of the latest places whose mask was computed

    @property
    def ended(self) -> bool:
        """Whether an end token was taken."""
        return self._at == self._ended_at

    @property
    def complete(self) -> bool:
        """Whether only an end token may come next."""
        self._forced_here()
        return self._at == self._complete_at

    @property
    def forced_token(self) -> int | None:
        """The next token where it is the only legal one; None if several are legal, or none."""
        forced = self._forced_here()
        return None if forced == _FREE else forced

    def allows(self, token: int) -> bool:
        if self._at < len(self._path) and token == self._path[self._at]:
            return True
        return self.first_legal([token]) is not None

    def first_legal(self, tokens: list[int]) -> int | None:
        """The index of the first legal one of some tokens; None if there is none."""
        forced = self._forced_here()
        if forced != _FREE:
            return tokens.index(forced) if forced in tokens else None
        if self.ended:
            return None
        self._follow()
        valid, size = self._matcher.validate_tokens, self._vocabulary.size
        for index, token in enumerate(tokens):
            if token < size and valid([token]):
                return index
        self._require_intact()
        return None

    def mask(self) -> Words:
        """The legal tokens, as :mod:`trimode.model.step` defines ``token_mask``: [ceil(V / 32)] uint32, read only."""
        mask = self._masks.get(self._at)
        if mask is None:
            mask = self._masks[self._at] = self._computed_mask()
            mask.setflags(write=False)
            if len(self._masks) > _KEPT_MASKS:
                del self._masks[next(iter(self._masks))]
        return mask

    def _computed_mask(self) -> Words:
        forced = self._forced_here()
        if forced != _FREE or self.ended:
            words = np.zeros(mask_words(self._vocabulary.size), np.uint32)
            if forced != _FREE:
                words[forced // 32] = 1 << forced % 32
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
        forced = self._forced_here()
        if forced == _FREE:
            return self._take_free(token)
        if token == forced:
            self._append(token)
        return token == forced

    def _take_free(self, token: int) -> bool:
        """Take a token where the grammar forces none, if it is legal; returns whether it was."""
        if token in self._vocabulary.end_ids:
            legal = self.allows(token)
        elif self._at == self._ended_at or token >= self._vocabulary.size:
            legal = False
        else:
            self._follow()
            legal = bool(self._matcher.try_consume_tokens([token]))
            self._followed += legal
            if not legal:
                self._require_intact()
        if legal:
            self._append(token)
        return legal

    def _append(self, token: int) -> None:
        """Add a legal token to those taken."""
        if self._at < len(self._path):
            self._forget_undone()
        self._path.append(token)
        self._at += 1
        self._note_end(token)

    def _note_end(self, token: int) -> None:
        """If the token taken last is an end token, nothing is legal after it."""
        if token in self._vocabulary.end_ids:
            self._ended_at = self._at
            self._forced[self._at :] = [_FREE]

    def take_all(self, tokens: list[int]) -> int:
        """Take these tokens up to the first illegal one; returns how many were taken."""
        end = self._at + len(tokens)
        if self._path[self._at : end] == tokens:
            self._at = end
            return len(tokens)
        for taken, token in enumerate(tokens):
            if not self.take(token):
                return taken
        return len(tokens)

    def take_free(self, tokens: list[int]) -> int:
        """Take these tokens up to the first illegal one, to a place where the grammar forces the token, or to the end;
        returns how many were taken.
        """
        for taken, token in enumerate(tokens):
            if self._forced_here() != _FREE or not self.take(token):
                return taken
        return len(tokens)

    def take_forced(self, most: int) -> list[int]:
        """Take the next tokens as long as the grammar forces them, at most ``most``; returns them."""
        begin, end = self._at, self._at + most
        while self._at < end and self._forced_here() != _FREE:
            known = self._forced[self._at : end]
            run = known[: known.index(_FREE)] if _FREE in known else known
            for ending in self._vocabulary.end_ids:
                if ending in run:
                    run = run[: run.index(ending) + 1]
            if self._at + len(run) > len(self._path):  # an undone token here can only be the forced one
                self._path[self._at :] = run
            self._at += len(run)
            self._note_end(run[-1])
        return self._path[begin : self._at]

    def undo(self, count: int) -> None:
        """Undo the latest tokens taken."""
        self._at -= count

    def _forget_undone(self) -> None:
        """Forget the undone tokens, and what is known of the places after them."""
        at = self._at
        del self._path[at:], self._forced[at + 1 :]
        if self._masks:
            self._masks = {place: mask for place, mask in self._masks.items() if place <= at}
        if self._complete_at > at:
            self._complete_at = _NOWHERE
        if self._ended_at > at:
            self._ended_at = _NOWHERE

    def _forced_here(self) -> int:
        """The token that the grammar forces at the place of the next token, else _FREE."""
        if self._at == len(self._forced):
            self._follow()
            run = self._matcher.compute_ff_tokens()
            if run:
                self._forced += run
            elif self._matcher.is_stopped():
                self._require_intact()
                self._forced.append(self._vocabulary.end_ids[0])
                self._complete_at = self._at
            else:
                self._forced.append(_FREE)
        return self._forced[self._at]

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
