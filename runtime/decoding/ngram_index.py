"""The text of one answer, indexed by its n-grams: finds earlier occurrences of its last tokens, and what followed them.

Hash chains, as zlib uses them: a table holds the newest position after each n-gram, and each position links to the one
before it with the same n-gram. Adding a token takes one table update. A search compares at most ``MOST_PLACES`` earlier
positions with the end of the text, at most ``LONGEST_MATCH`` tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

GRAM = 3  # least number of tokens that must match
MOST_PLACES = 8
LONGEST_MATCH = 16


class Match(NamedTuple):
    """What followed an earlier occurrence of the text's end. length: tokens of that occurrence that match."""

    tokens: list[int]
    length: int


class NgramIndex:
    """tokens: the text so far."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._newest: dict[tuple[int, ...], int] = {}
        self._earlier: list[int | None] = []  # by position: the one before it that follows the same n-gram

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        text, newest, earlier = self.tokens, self._newest, self._earlier
        for token in tokens:
            position = len(text)
            if position < GRAM:
                earlier.append(None)
            else:
                gram = text[-3], text[-2], text[-1]
                earlier.append(newest.get(gram))
                newest[gram] = position
            text.append(token)

    def continuation(self, known: Sequence[int], most: int) -> Match | None:
        """At most ``most`` tokens that may follow the text and then ``known``; None if their end did not occur before.

        Of the newest occurrences, the one with the longest match is used; of equally long ones, the newest. Where the
        occurrence overlaps the end of the text, the repetition is continued.
        """
        end = [*self.tokens[-LONGEST_MATCH:], *known][-LONGEST_MATCH:]
        if most < 1:
            return None
        matches: list[tuple[int, int]] = []  # lengths and positions
        position = self._newest.get(tuple(end[-GRAM:]))
        while position is not None and len(matches) < MOST_PLACES:
            matches.append((self._matched(position, end), position))
            position = self._earlier[position]
        if not matches:
            return None
        longest, best = max(matches)
        found = self.tokens[best : best + most]
        tail = [*known, *found]
        while len(found) < most:  # the text is followed by ``known`` and by what is found so far
            token = tail[best + len(found) - len(self.tokens)]
            found.append(token)
            tail.append(token)
        return Match(found, longest)

    def _matched(self, position: int, end: Sequence[int]) -> int:
        """How many tokens before ``position`` equal those of ``end``, from the last one backwards."""
        length = GRAM
        most = min(len(end), position)
        while length < most and self.tokens[position - 1 - length] == end[-1 - length]:
            length += 1
        return length
