"""The n-gram index finds what a plain search of the text finds, at a bounded cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.runtime.decoding import ngram_index
from trimode.runtime.decoding.ngram_index import GRAM, LONGEST_MATCH, MOST_PLACES, Match, NgramIndex

words = st.lists(st.integers(0, 2), max_size=60)


def searched(text: list[int], behind: list[int], most: int) -> Match | None:
    """By comparing the end with every earlier position, newest first."""
    end = [*text, *behind][-LONGEST_MATCH:]
    if len(end) < GRAM:
        return None
    matches = []
    for position in range(len(text) - 1, GRAM - 1, -1):
        length = 0
        while length < min(len(end), position) and text[position - 1 - length] == end[-1 - length]:
            length += 1
        if length >= GRAM:
            matches.append((length, position))
    if not matches:
        return None
    length, position = max(matches[:MOST_PLACES], key=lambda match: match[0])
    whole = [*text, *behind]
    for at in range(position, position + most):
        whole.append(whole[at])
    return Match(whole[len(text) + len(behind) :], length)


@given(text=words, behind=st.lists(st.integers(0, 2), max_size=5), most=st.integers(1, 20), cut=st.integers(0, 60))
def test_it_finds_what_a_search_of_the_text_finds(text: list[int], behind: list[int], most: int, cut: int) -> None:
    index = NgramIndex()
    index.extend(text[:cut])
    index.extend(text[cut:])
    assert index.continuation(behind, most) == searched(text, behind, most)
    assert index.tokens == text


def test_a_repetition_that_reaches_the_end_of_the_text_goes_on() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 4] * 3)
    assert index.continuation([], 10) == Match([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 8)
    assert index.continuation([1], 3) == Match([2, 3, 4], 9)


def test_the_longest_match_wins_and_then_the_newest() -> None:
    index = NgramIndex()
    index.extend([9, 1, 2, 3, 7, 8, 1, 2, 3, 5, 6, 1, 2, 3, 4, 9, 1, 2, 3])
    assert index.continuation([], 1) == Match([7], 4)
    assert index.continuation([4, 8, 1, 2, 3], 1) == Match([5], 4)
    assert index.continuation([0, 1, 2, 3], 1) == Match([4], 3)


def test_nothing_is_found_without_an_earlier_occurrence_or_without_room() -> None:
    index = NgramIndex()
    assert index.continuation([1, 2, 3], 4) is None
    index.extend([1, 2, 3])
    assert index.continuation([], 4) is None
    assert index.continuation([1, 2, 3], 4) is None  # what follows 1, 2, 3 is not known yet
    index.extend([4])
    assert index.continuation([1, 2, 3], 2) == Match([4, 1], 3)
    assert index.continuation([1, 2, 3], 0) is None


@pytest.mark.parametrize("length", [100, 5000])
def test_the_cost_of_a_search_does_not_grow_with_the_text(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst text: all of its n-grams are the same."""
    index, compared = NgramIndex(), 0
    matched = NgramIndex._matched

    def counted(self: NgramIndex, position: int, end: list[int]) -> int:
        nonlocal compared
        compared += 1
        return matched(self, position, end)

    monkeypatch.setattr(ngram_index.NgramIndex, "_matched", counted)
    index.extend([5] * length)
    assert index.continuation([], 4) == Match([5] * 4, 16)
    assert compared == 8
    assert len(index._newest) == 1
