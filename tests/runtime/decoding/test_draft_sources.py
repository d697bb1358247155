"""What each source of drafts proposes, expects and learns."""

from __future__ import annotations

import numpy as np
import pytest

from trimode.runtime.decoding.acceptance_rates import Acceptance, SharedAcceptance
from trimode.runtime.decoding.draft_sources import (
    FORCED_ONLY,
    NO_DRAFTS,
    DraftSource,
    KeptDrafts,
    MaskedDrafts,
    expected_tokens,
)
from trimode.runtime.decoding.lookup import Lookup, LookupAcceptance

MASK = 100


def acceptance(*rates: float) -> Acceptance:
    found = Acceptance(SharedAcceptance())
    found.rates[: len(rates)] = rates
    found.end_rate = 0.0
    return found


def kept(rates: tuple[float, ...], places: int) -> KeptDrafts:
    """Candidates of the first positions of a block: 301 or 401, 302 or 402, ..."""
    source = KeptDrafts(acceptance(*rates))
    source.keep(np.array([[300 + place, 400 + place] for place in range(1, places + 1)]))
    return source


def lookup() -> Lookup:
    found = Lookup([7, 8, 300, 301, 302, 303, 7, 8, 300], LookupAcceptance(acceptance(0.5), acceptance(0.5)))
    found.find([], 3)
    return found


def test_proposals_are_no_longer_than_asked() -> None:
    source = kept((0.9, 0.9, 0.9), 3)
    source.select(0, 10)
    for drafts, proposed in (
        (MaskedDrafts(MASK, acceptance()), [MASK, MASK]),
        (source, [301, 302]),
        (lookup(), [301, 302]),
        (NO_DRAFTS, []),
        (FORCED_ONLY, []),
    ):
        found: DraftSource = drafts
        assert found.propose(2) == proposed
        assert found.propose(0) == []


@pytest.mark.parametrize(
    ("known", "room", "selected"),
    [
        (0, 10, [301, 302]),  # the third is accepted with probability 0.9 * 0.5 * 0.1
        (1, 10, [302, 303]),  # the candidate of a known token is left out
        (0, 2, [301]),
        (3, 4, []),
        (9, 20, []),
    ],
)
def test_kept_candidates_that_are_likely_and_have_room(known: int, room: int, selected: list[int]) -> None:
    source = kept((0.9, 0.5, 0.1), 5)
    source.select(known, room)
    assert source.propose(9) == selected
    source.keep(np.empty((0, 2), np.int64))
    source.select(known, room)
    assert source.propose(9) == []


def test_expected_tokens_count_the_proposed_ones_and_one_more() -> None:
    drafts = MaskedDrafts(MASK, acceptance(0.9, 0.5))
    assert [expected_tokens(drafts, count) for count in (0, 1, 2)] == pytest.approx([1.0, 1.9, 2.35])
    assert expected_tokens(drafts, 1000) == drafts.yields()[-1]
    assert expected_tokens(NO_DRAFTS, 0) == 1.0
    assert expected_tokens(lookup(), 1) == pytest.approx(1.5)


def test_a_commit_teaches_the_source_of_its_drafts() -> None:
    for make in (lambda rates: MaskedDrafts(MASK, rates), KeptDrafts):
        rates = acceptance(0.5, 0.5)
        make(rates).learn(1, 2, False)
        assert rates.rates[:2] == pytest.approx([0.55, 0.45])
    copies = lookup()
    before = list(copies.yields())
    copies.learn(0, 1, False)  # which observe does
    assert copies.yields() == before
