"""Acceptance rates on worked examples: what one cycle changes, and what a cycle without drafts forgets."""

from __future__ import annotations

import pytest

from trimode.runtime.decoding.acceptance_rates import Acceptance, SharedAcceptance

PLACES = 31  # drafts of the longest block that auto chooses
WIDTHS = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2]  # first guesses of what trees of 1, 2, 4, ... nodes gain


def test_what_is_assumed_before_anything_is_seen() -> None:
    for of_all in (SharedAcceptance(), SharedAcceptance(first_guess=0.5)):
        guess = 0.8 if of_all.rates[0] == 0.8 else 0.5
        assert of_all.rates == pytest.approx([guess] * PLACES)
        assert of_all.tree_gains == WIDTHS
        own = Acceptance(of_all)
        assert (own.rates, own.tree_gains, own.end_rate) == (of_all.rates, WIDTHS, 0.01)
    yields = Acceptance().yields()
    assert len(yields) == PLACES + 1
    goes_on = 0.8 * 0.99
    assert yields[:3] == pytest.approx([1, 1 + goes_on, 1 + goes_on + goes_on**2])


def test_one_cycle_changes_a_sequences_own_rates_by_a_tenth() -> None:
    own = Acceptance()
    own.observe(accepted=2, tested=3, ended=False)
    assert own.rates == pytest.approx([0.82, 0.82, 0.72, *[0.8] * (PLACES - 3)])
    own.observe(accepted=1, tested=1, ended=False)  # the block ended there
    assert own.rates == pytest.approx([0.838, 0.82, 0.72, *[0.8] * (PLACES - 3)])
    assert own.yields()[1] == pytest.approx(1 + 0.838 * 0.99)


@pytest.mark.parametrize("accepted", [PLACES - 1, PLACES, 40])
def test_drafts_behind_the_longest_block_are_not_counted(accepted: int) -> None:
    shared = SharedAcceptance()
    own = Acceptance(shared)
    own.observe(accepted=accepted, tested=accepted + 1, ended=False)
    last = 0.82 if accepted >= PLACES else 0.72
    assert own.rates == pytest.approx([*[0.82] * (PLACES - 1), last])
    assert len(shared.rates) == PLACES


def test_the_averages_over_all_sequences_are_means_with_four_cycles_of_the_place_before() -> None:
    shared = SharedAcceptance()
    shared.observe(accepted=1, tested=2, ended=False)
    first = (1 + 4 * 0.8) / 5
    second = 4 * first / 5
    assert shared.rates == pytest.approx([first, *[second] * (PLACES - 1)])
    shared.observe(accepted=0, tested=1, ended=False)
    assert shared.rates[0] == pytest.approx((2 * 0.5 + 4 * 0.8) / 6)


def test_a_hundred_cycles_count_in_the_averages_over_all_sequences() -> None:
    shared = SharedAcceptance()
    for _ in range(150):
        shared.observe(accepted=1, tested=1, ended=False)
        shared.observe_tree(0, 1.0)
    shared.observe(accepted=0, tested=1, ended=False)
    shared.observe_tree(0, 0.0)
    assert shared.rates[0] == pytest.approx((99 + 4 * 0.8) / 104)
    assert shared.tree_gains[0] == pytest.approx((99 + 4 * WIDTHS[0]) / 104)


def test_the_end_rate_moves_by_the_share_of_the_tokens_that_count() -> None:
    """Of 100 assumed tokens, one is an end. At most 2000 count."""
    shared = SharedAcceptance()
    shared.observe(accepted=3, tested=3, ended=True)
    assert shared.end_rate == pytest.approx((1 - 4 / 104) * 0.01 + 1 / 104)
    for _ in range(400):
        shared.observe(accepted=4, tested=4, ended=False)
    before = shared.end_rate
    shared.observe(accepted=4, tested=4, ended=True)
    assert shared.end_rate == pytest.approx((1 - 5 / 2000) * before + 1 / 2000)
    shared.observe(accepted=2000, tested=2000, ended=True)
    assert shared.end_rate == pytest.approx(1 / 2000)
    assert Acceptance(shared).end_rate == shared.end_rate


def test_a_sequence_takes_the_end_rate_of_all() -> None:
    shared = SharedAcceptance()
    own, alone = Acceptance(shared), Acceptance()
    own.observe(accepted=0, tested=0, ended=True)
    alone.observe(accepted=0, tested=0, ended=True)
    assert own.end_rate == shared.end_rate > 0.01
    assert alone.end_rate == 0.01


def test_a_cycle_without_drafts_forgets_a_twentieth_of_a_sequences_own_rates() -> None:
    shared = SharedAcceptance()
    own = Acceptance(shared)
    own.observe(accepted=0, tested=1, ended=False)
    first = own.yields()
    before = own.rates[0]
    own.forget()
    cycles = 1 - 0.0005
    of_all = 4 * 0.8 / (4 + cycles)
    assert shared.rates[0] == pytest.approx(of_all)
    assert own.rates[0] == pytest.approx(before + 0.05 * (of_all - before))
    assert own.yields() != first
    alone = Acceptance()
    alone.observe(accepted=0, tested=1, ended=False)
    alone.forget()
    assert alone.rates[0] == pytest.approx(0.72)


@pytest.mark.parametrize(("width", "place"), [(1, 0), (2, 1), (3, 1), (4, 2), (31, 4), (32, 5), (63, 5), (1000, 5)])
def test_a_tree_counts_for_the_power_of_two_below_its_width(width: int, place: int) -> None:
    shared = SharedAcceptance()
    own = Acceptance(shared)
    own.observe_tree(width, 3.0)
    expected = WIDTHS.copy()
    expected[place] += 0.05 * (3 - WIDTHS[place])
    assert own.tree_gains == pytest.approx(expected)
    assert own.tree_gain(width) == own.tree_gains[place]
    of_all = WIDTHS.copy()
    of_all[place] = (3 + 4 * WIDTHS[place]) / 5
    assert shared.tree_gains == pytest.approx(of_all)


def test_cycles_without_drafts_may_be_counted_together() -> None:
    one_by_one, together = (Acceptance(SharedAcceptance()) for _ in range(2))
    for each in (one_by_one, together):
        for _ in range(20):
            each.observe(accepted=1, tested=2, ended=False)
        each.rates[:] = [0.5] * PLACES
    for _ in range(8):
        one_by_one.forget()
    together.forget(8)
    assert together.rates == pytest.approx(one_by_one.rates, abs=1e-3)
    assert together.rates[0] > 0.6


def test_a_cycle_with_a_draft_forgets_a_little_of_what_trees_gained() -> None:
    shared = SharedAcceptance()
    own = Acceptance(shared)
    own.observe_tree(32, 4.0)
    own.forget_trees()
    assert own.tree_gains[5] == pytest.approx(2.1 - 0.0005 * 0.1)
    cycles = 1 - 0.0005
    assert shared.tree_gains[5] == pytest.approx((cycles * 4 + 4 * 2) / (cycles + 4))
    own.observe_tree(32, 2.0)
    assert shared.tree_gains[5] == pytest.approx(
        ((2 - 0.001) * (4 + (2 - 4) / (cycles**2 + 1)) + 4 * 2) / (2 - 0.001 + 4), rel=1e-6
    )
