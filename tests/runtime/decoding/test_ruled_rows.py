"""A row's legal candidates against a plain sort of the whole vocabulary, and how often rows are run again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.support.ruled_language import LETTERS, rules
from tests.support.token_masks import best_legal
from trimode.runtime.decoding.ruled_rows import AgainRate, Biases, RuledRows
from trimode.runtime.decoding.token_rules import TokenRules, are_legal, token_bits
from trimode.runtime.executor import Candidates

VOCABULARY, MASK, END = 40, 0, 39


def reported(logits: np.ndarray, legal: np.ndarray, most: int, asked: np.ndarray | None) -> Candidates:
    """One row's candidates, as an engine reports them."""
    found = best_legal(logits[None], legal[None], MASK, most)
    return found._replace(asked_logits=None if asked is None else logits[asked])


@settings(deadline=None, max_examples=400)
@given(
    seed=st.integers(0, 2**32 - 1),
    most=st.integers(1, 8),
    needed=st.sampled_from([1, 2, 5, None]),
    biased=st.sampled_from([0, 1, 3, 39]),
    legal_share=st.sampled_from([0.05, 0.3, 0.9, 1.0]),
    masked=st.booleans(),
    logprobs=st.booleans(),
)
def test_candidates_are_the_best_legal_tokens_of_the_whole_vocabulary(
    seed: int, most: int, needed: int | None, biased: int, legal_share: float, masked: bool, logprobs: bool
) -> None:
    """The row is run again only where the reported tokens do not tell."""
    rng = np.random.default_rng(seed)
    logits = rng.permutation(np.arange(VOCABULARY) / 4).astype(np.float32)
    legal = rng.random(VOCABULARY) < legal_share
    legal[MASK], legal[END] = False, True
    by_token = {int(token): float(rng.normal(0, 3)) for token in rng.permutation(range(1, VOCABULARY))[:biased]}
    wanted = most if needed is None else min(needed, most)
    needed = None if needed is None else wanted
    law = TokenRules(VOCABULARY, set(), allowed=np.flatnonzero(legal).tolist())
    biases = Biases(by_token, VOCABULARY) if by_token else None
    rows = RuledRows(law, biases, law.walk([5]), needed, logprobs)
    inputs = rows.inputs([0] if masked else [])
    assert (inputs.masks is None) == (logprobs or not masked)
    asked = None if inputs.asked is None else inputs.asked
    if asked is not None:
        assert asked[0].tolist() == [*sorted(by_token), *[0] * logprobs]
    everything = np.ones(VOCABULARY, np.bool_)
    if inputs.masks is not None:
        unbiased = legal & ~np.isin(np.arange(VOCABULARY), list(by_token))
        assert are_legal(inputs.masks[0], np.arange(VOCABULARY)).tolist() == unbiased.tolist()
        everything = unbiased
    first = reported(logits, everything, most, asked)
    again = rows.absorb(first)
    values = logits + np.array([by_token.get(token, 0) for token in range(VOCABULARY)], np.float32)
    best = sorted(np.flatnonzero(legal).tolist(), key=lambda token: (-values[token], token))
    unknown = [token for token in best if token not in first.tokens[0] and token not in by_token]
    told = [token for token in best if token not in unknown]
    if inputs.masks is not None:
        assert again is None
    else:
        # A token that is not reported is below the last reported one.
        sure = [token for token in told if token not in by_token or values[token] > first.logits[0, -1]]
        assert (again is not None) == (bool(unknown) and len(sure) < wanted)
    if again is not None:
        mask = are_legal(again[1][0], np.arange(VOCABULARY))
        assert again[0].tolist() == [0]
        rows.absorb_again(again[0], reported(logits, mask, most, None))
    if rows.agreed.get(0) is None:
        choice = rows.choice(0)
        assert choice.tokens.tolist() == best[:wanted]
        np.testing.assert_allclose(choice.logits, values[best[:wanted]])
        if logprobs:
            for token in choice.tokens.tolist():
                assert rows.logit(0, token) == pytest.approx(float(logits[token]))


@pytest.mark.parametrize(("logit", "again"), [(2.5, False), (2.0, True), (1.5, True)])
def test_a_bias_that_ties_with_the_last_reported_token_may_not_be_the_best(logit: float, again: bool) -> None:
    """20 is banned. A token between 20 and 30 that is not reported may have the logit 3, too, and comes before 30."""
    law = TokenRules(VOCABULARY, set(), banned=[20])
    rows = RuledRows(law, Biases({30: 1.0}, VOCABULARY), law.walk([5]), 2, logprobs=False)
    rows.inputs([])
    logits, asked = np.array([[5.0, 3.0]], np.float32), np.array([[logit]], np.float32)
    found = rows.absorb(Candidates(logits, np.array([[10, 20]]), np.zeros(1, np.float32), asked))
    assert (found is not None) == again
    if found is not None:
        rows.absorb_again(found[0], Candidates(logits, np.array([[10, 25]]), np.zeros(1, np.float32)))
    assert rows.choice(0).tokens.tolist() == ([10, 25] if again else [10, 30])


def counted(rows: RuledRows, doubtful: set[int]) -> tuple[int, int, int]:
    """Rows with masks, rows run again, and rows with enough legal candidates."""
    found: list[tuple[int, int, int]] = []

    class Rate(AgainRate):
        def observe(self, masked: int, again: int, enough: int) -> None:
            found.append((masked, again, enough))

    rows.observe(doubtful, Rate())
    return found[0]


def of_tokens(*tokens: list[int]) -> Candidates:
    rows, most = len(tokens), len(tokens[0])
    logits = np.tile(np.arange(most, 0, -1, dtype=np.float32), (rows, 1))
    return Candidates(logits, np.array(tokens), np.zeros(rows, np.float32))


@pytest.mark.parametrize(
    ("second", "expected"),
    [([3, 5], (2, 0, 1)), ([3, 4], (2, 1, 0))],
)
def test_doubtful_rows_are_counted_where_the_text_may_come_to_them(
    second: list[int], expected: tuple[int, int, int]
) -> None:
    """Tokens 3 and 4 are banned, so that the second row has the draft 5, or none of the reported ones is legal."""
    law = TokenRules(VOCABULARY, {END}, banned=[3, 4])
    rows = RuledRows(law, None, law.walk([2, 6, 5]), 1, logprobs=False)
    masks = rows.inputs([0, 2]).masks
    assert masks is not None
    restricted = [not are_legal(masks[row], np.array([3, 4])).any() for row in range(3)]
    assert restricted == [True, False, True]
    again = rows.absorb(of_tokens([6, 7], second, [8, 9]))
    assert (again is None) == (expected[1] == 0)
    assert counted(rows, {0, 1, 2}) == expected
    assert counted(rows, {1}) == (0, expected[1], expected[2])
    assert rows.agreed.get(0) == 6
    if again is not None:
        rows.absorb_again(again[0], of_tokens([5, 9]))
    assert rows.agreed.get(1) == (5 if again is not None else None)
    if again is None:
        assert rows.choice(1).tokens.tolist() == [5]
    assert rows.choice(2).tokens.tolist() == [8]


def test_rows_behind_another_token_are_neither_chosen_nor_counted() -> None:
    law = TokenRules(VOCABULARY, {END}, banned=[3])
    rows = RuledRows(law, None, law.walk([2, 6, 5]), 1, logprobs=False)
    assert rows.inputs([]).masks is None
    assert rows.absorb(of_tokens([7, 6], [3, 5], [3, 3])) is None
    assert rows.agreed.get(0) is None
    assert rows.choice(0).tokens.tolist() == [7]
    assert counted(rows, {0, 1, 2}) == (0, 0, 1)


@pytest.mark.parametrize("needed", [2, None])
def test_where_more_than_the_best_candidate_is_needed_a_draft_does_not_decide(needed: int | None) -> None:
    """Such as in sampling. The text reaches the row after the draft only if it is drawn."""
    law = TokenRules(VOCABULARY, {END}, banned=[3])
    rows = RuledRows(law, None, law.walk([2, 6, 5]), needed, logprobs=False)
    assert rows.absorb(of_tokens([6, 7], [5, 8], [8, 9])) is None
    assert [rows.agreed.get(row) for row in range(3)] == [None] * 3
    assert [rows.choice(row).tokens.tolist() for row in range(3)] == [[6, 7], [5, 8], [8, 9]]


def test_a_bias_may_decide_against_the_best_draft() -> None:
    law = TokenRules(VOCABULARY, {END}, banned=[3])
    rows = RuledRows(law, Biases({7: 9.0}, VOCABULARY), law.walk([2, 6, 5]), 1, logprobs=False)
    asked = rows.inputs([]).asked
    assert asked is not None
    assert asked.tolist() == [[7]] * 3
    found = of_tokens([6, 7], [5, 8], [8, 9])._replace(asked_logits=np.full((3, 1), 1.0, np.float32))
    assert rows.absorb(found) is None
    assert rows.agreed.get(0) is None
    assert rows.choice(0).tokens.tolist() == [7]


def test_forced_rows_need_no_candidates_and_are_not_counted() -> None:
    law = rules(LLMatcher(LETTERS.tokenizer, LLMatcher.grammar_from_regex("a(bc|d)e")))
    rows = RuledRows(law, None, law.walk([99, 2, 3, 4, 6]), 1, logprobs=True)
    inputs = rows.inputs([0, 1, 2, 3, 4])
    assert inputs.masks is None
    assert inputs.asked is not None
    assert inputs.asked.tolist() == [[2], [0], [4], [6], [1]]  # the tokens that the grammar forces
    assert rows.absorb(of_tokens([5, 6], [3, 5], [5, 5], [5, 5], [5, 5])) is None
    assert rows.forced_among([0, 1, 2, 3, 4]) == [0, 2, 3, 4]
    assert [rows.agreed.get(row) for row in range(4)] == [2, 3, 4, 6]
    assert rows.choice(4).tokens.tolist() == [1]
    assert counted(rows, {0, 1, 2, 3, 4}) == (0, 0, 1)


def test_masks_come_at_once_while_many_doubtful_rows_are_run_again() -> None:
    """A mask hides whether it was needed, so the rate falls with each, and rows are tried without masks again."""
    rate = AgainRate()
    assert rate.pays
    rate.observe(masked=11, again=0, enough=0)
    assert rate.pays
    rate.observe(masked=0, again=0, enough=1)
    assert not rate.pays
    rate.observe(masked=0, again=1, enough=0)
    assert rate.pays
    for rows in ({"masked": 20, "enough": 0}, {"masked": 0, "enough": 20}):
        other = AgainRate()
        other.observe(again=20, **rows)
        # Of 20 of 40 rows, the rate is at least a half.
        left = 0
        while other.pays:
            other.observe(masked=1, again=0, enough=0)
            left += 1
        assert 26 <= left <= 34


def legal_of(law: TokenRules) -> list[int]:
    return np.flatnonzero(are_legal(law.mask(), np.arange(VOCABULARY))).tolist()


@pytest.mark.parametrize(
    ("options", "legal"),
    [
        ({}, range(VOCABULARY)),
        ({"allowed": [3, 7, 31, 32, 39]}, [3, 7, 31, 32, 39]),
        ({"allowed": [3, 7], "banned": [7, 9]}, [3]),
        ({"banned": range(1, 40)}, [0]),
        ({"allowed": [3, 40, 63, 64, 999]}, [3]),  # the tokenizer may have more tokens than the model
    ],
)
def test_tokens_that_are_allowed_and_banned(options: dict[str, Any], legal: Any) -> None:
    law = TokenRules(VOCABULARY, {END}, **options)
    assert legal_of(law) == list(legal)
    assert [token for token in range(VOCABULARY) if law.allows(token)] == list(legal)
    assert (law.words, law.forced_token, law.complete, law.ended) == (2, None, False, False)
    assert law.walk([1, *list(legal)[:1]]).forced == {0: None, 1: None}


def test_the_first_legal_of_many_tokens() -> None:
    """Beyond the first few, by the mask."""
    law = TokenRules(VOCABULARY, set(), allowed=[30, 31])
    for place in (0, 1, 7, 8, 9, 12):
        tokens = np.arange(1, 14)
        tokens[place] = 30
        assert law.first_legal(tokens) == place
        assert law.take_first_legal(tokens) == place
        law.undo(1)
    assert law.first_legal(np.arange(1, 9)) is None
    assert law.first_legal(np.arange(1, 20)) is None
    assert law.take_first_legal(np.arange(1, 20)) is None


@pytest.mark.parametrize("vocabulary", [31, 32, 33, 64])
def test_a_mask_has_no_bit_of_a_token_that_the_model_does_not_have(vocabulary: int) -> None:
    bits = token_bits(vocabulary, [0, vocabulary - 1, vocabulary, vocabulary + 1, 1000])
    assert np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist() == [0, vocabulary - 1]
