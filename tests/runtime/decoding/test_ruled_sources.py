"""Which source a block under a grammar drafts from, and what its commit teaches. Scripted, without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from tests.runtime.decoding.test_cycles import Noted
from tests.runtime.decoding.test_ruled_cycles import END, MASK, A, B, C, D, E, masked_rows, rows
from tests.support.ruled_language import LETTERS, rules
from trimode import SamplingParams
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.lookup import Lookup, LookupAcceptance
from trimode.runtime.decoding.ruled_rows import AgainRate
from trimode.runtime.decoding.sequence import Pass, Sequence
from trimode.runtime.executor import Candidates


class Case:
    """An answer under a regular expression whose first token has come. Rows never get their masks at once."""

    def __init__(
        self,
        expression: str,
        first: int = A,
        *,
        prompt: tuple[int, ...] = (5,),
        lookup: LookupAcceptance | None = None,
        kept_rate: float = 0.8,
        **options: Any,
    ) -> None:
        params = SamplingParams(**{"mode": "linear_spec", "block_length": 4, "max_tokens": 20} | options)
        rate = AgainRate()
        rate.observe(0, 0, enough=99)
        self.acceptance, self.kept = Noted(), Noted()
        self.kept.rates[:] = [kept_rate] * len(self.kept.rates)
        self.sequence = Sequence(
            list(prompt),
            params,
            Ending(params, frozenset({END})),
            self.acceptance,
            context=60,
            mask_id=MASK,
            prefill_step=8,
            seed=0,
            rules=rules(LLMatcher(LETTERS.tokenizer, LLMatcher.grammar_from_regex(expression))),
            again_rate=rate,
            kept_acceptance=self.kept,
            lookup=None if lookup is None else Lookup(prompt, lookup),
        )
        self.absorb("prefill", rows([first]))

    def absorb(self, kind: str, found: Candidates) -> Pass:
        needed = self.sequence.next_pass()
        assert needed.kind == kind
        self.sequence.absorb(needed, found)
        return needed

    def rejected(self, length: int = 4) -> None:
        """A cycle whose drafts B, C, D fail at the first one; the rows after it predict D, then E, then A."""
        self.sequence.open_block(length)
        self.absorb("draft", rows([B, C], [C, D], [D, E]))
        self.absorb("commit", rows([E, B], [D, C], [E, D], [A, E]))
        assert self.sequence.emitted == [A, E]


def test_the_candidates_after_a_rejected_draft_are_the_next_drafts() -> None:
    case = Case("[a-e]{2,20}")
    case.rejected()
    expected = case.kept.yields()[3]
    case.sequence.open_block(4)
    commit = case.absorb("commit", rows([D, A], [E, A], [B, A], [C, A]))
    assert commit.tokens.tolist() == [E, D, E, A]
    assert case.sequence.emitted == [A, E, D, E, B]
    assert case.sequence.cycles[1][:5] == ("kept", 4, 4, expected, 3)
    assert (case.acceptance.cycles, case.kept.cycles) == ([(0, 1, False)], [(2, 3, False)])
    assert (case.sequence.counts.draft, case.sequence.counts.drafted, case.sequence.counts.accepted) == (1, 6, 2)


def test_an_illegal_kept_candidate_is_replaced_by_the_next_best() -> None:
    case = Case("a[be][c-e][ac]{2,9}")
    case.sequence.open_block(4)
    case.absorb("draft", rows([B, C], [C, D], [C, A]))
    case.absorb("commit", rows([E, B], [D, C], [E, C], [B, A]))
    case.sequence.open_block(4)
    assert case.sequence.next_pass().tokens.tolist() == [E, D, C, A]


@pytest.mark.parametrize(
    ("kept_rate", "kind"),
    [
        (0.8, "commit"),
        (0.38, "commit"),  # 1.38 tokens of one candidate for a pass, and 2.95 for two
        (0.29, "draft"),  # 1.38 in two places
        (0.05, "draft"),
    ],
)
def test_a_draft_pass_runs_where_it_yields_more_than_twice_the_kept_candidates(kept_rate: float, kind: str) -> None:
    """Candidates with a rate of 0.38 are likely in two places, those with 0.29 in one. A draft yields 2.952 tokens."""
    case = Case("[a-e]{2,20}", kept_rate=kept_rate)
    case.rejected()
    case.sequence.open_block(4)
    assert case.sequence.next_pass().kind == kind


def test_kept_candidates_that_are_not_used_are_forgotten() -> None:
    case = Case("[a-e]{2,20}", kept_rate=0.29)
    forgotten = 0

    def forget() -> None:
        nonlocal forgotten
        forgotten += 1

    case.kept.forget = forget  # type: ignore[method-assign]
    case.rejected()
    assert forgotten == 0
    case.sequence.open_block(4)
    assert forgotten == 1


@pytest.mark.parametrize(
    ("forced", "length", "kind"),
    [(1, 8, "draft"), (2, 8, "draft"), (3, 8, "commit"), (1, 5, "draft"), (1, 4, "commit"), (5, 8, "commit")],
)
def test_forced_tokens_alone_are_verified_where_drafts_after_them_yield_less_than_twice_as_much(
    forced: int, length: int, kind: str
) -> None:
    """Drafts yield at most 2.9, 3.3 and 4.1 tokens in blocks of 4, 5 and 8. A pass of k forced tokens yields k + 1."""
    case = Case("a" * (1 + forced) + "[a-e]{9,20}", block_length=8)
    case.sequence.open_block(length)
    needed = case.sequence.next_pass()
    assert needed.kind == kind
    assert len(needed.tokens) == 1 + forced + (length - 1 if kind == "draft" else 0)


def test_a_prefill_has_the_mask_of_its_last_row_at_once() -> None:
    """Nothing is known of the first token, so its candidates may well be illegal."""
    params = SamplingParams(max_tokens=9, mode="linear_spec")
    grammar = rules(LLMatcher(LETTERS.tokenizer, LLMatcher.grammar_from_regex("[ab]{2,9}")))
    sequence = Sequence(
        [5] * 12, params, Ending(params, frozenset({END})), Noted(), context=60, mask_id=MASK, prefill_step=8, seed=0,
        rules=grammar, again_rate=AgainRate(),
    )  # fmt: skip
    first = sequence.next_pass()
    assert (len(first.tokens), first.masks) == (8, None)
    sequence.absorb(first, rows([E, D]))
    last = sequence.next_pass()
    assert masked_rows(last.masks) == [0]
    assert last.rows.tolist() == [3]


def test_copies_come_after_the_tokens_that_the_grammar_forces() -> None:
    """The grammar forces the b of the prompt's c d b c b a, so c and b may be copied: as many as the text has room."""
    acceptance = LookupAcceptance(Noted(), Noted())
    case = Case("db[a-e]{3,9}", D, prompt=(C, D, B, C, B, A, E, C), lookup=acceptance, max_tokens=5)
    expected = acceptance.short.yields()[:3]
    assert case.sequence.look_up() == expected
    case.sequence.open_block(4, looked_up=True)
    commit = case.absorb("commit", rows([C, A], [C, A], [D, A], [E, A]))
    assert commit.tokens.tolist() == [D, B, C, B]
    assert case.sequence.emitted == [D, B, C, D]
    assert acceptance.short.cycles == [(1, 2, False)]  # type: ignore[attr-defined]
    assert case.sequence.cycles[0][:5] == ("copy", 4, 4, 1 + expected[2], 3)


def of_probabilities(*places: tuple[int, int, float]) -> Candidates:
    """Two candidates a row, and the probability of the better one; logits are not normalised."""
    first = np.array([place[2] for place in places])
    logits = np.log(np.stack([first, 1 - first], axis=1)) + 3
    return Candidates(
        logits.astype(np.float32), np.array([place[:2] for place in places]), np.full(len(places), 3, np.float32)
    )


@pytest.mark.parametrize(
    ("sure", "width", "tokens"),
    [
        (0.9, 3, [A, B, D]),  # the path b d, 0.81, is likelier than c, 0.1
        (0.6, 3, [A, B, C]),  # c, 0.4, is likelier than b d, 0.36
        (0.6, 4, [A, B, D, C]),
    ],
)
def test_a_tree_under_a_grammar_has_the_likeliest_paths(sure: float, width: int, tokens: list[int]) -> None:
    case = Case("[a-e]{2,20}", block_length=3, tree_width=width)
    case.sequence.open_block(3)
    case.absorb("draft", of_probabilities((B, C, sure), (D, E, sure)))
    assert case.sequence.next_pass().tokens.tolist() == tokens


def ruled_tree(expression: str, width: int, *places: tuple[int, int, float], **options: Any) -> Case:
    case = Case(expression, **{"mode": "auto", "block_length": 8} | options)
    case.acceptance.rates[:] = [0.98] * len(case.acceptance.rates)
    case.sequence.open_block(len(places) + 1, tree=True)
    case.sequence._tree_width = width
    case.absorb("draft", of_probabilities(*places))
    return case


def test_a_tree_has_the_forced_tokens_before_its_drafts_in_addition() -> None:
    case = ruled_tree("aa[a-e]{9,20}", 3, (B, C, 0.6), (D, E, 0.6), (E, D, 0.6))
    needed = case.sequence.next_pass()
    assert needed.tokens.tolist() == [A, A, B, C]
    assert needed.tree is not None
    assert needed.tree.parents == [-1, 0, 1, 1]
    case.absorb("commit", rows([A, B], [C, B], [A, B], [E, B]))
    assert case.sequence.emitted == [A, A, C, E]
    assert case.sequence.origins == ["forced", "forced", "accepted", "bonus"]
    # The chain a b d alone would have yielded the forced token and one more.
    assert case.acceptance.cycles == [(0, 1, False)]
    assert case.acceptance.trees == [(3, 1.0)]
    assert (case.sequence.counts.drafted, case.sequence.counts.accepted) == (2, 1)


def test_a_forced_token_at_the_end_of_a_tree_says_nothing_about_the_draft() -> None:
    """The grammar forces c after the draft b. The draft was right, and its next token, d, was not."""
    case = ruled_tree("a[be]c[a-e]{5,20}", 3, (B, E, 0.9), (D, A, 0.9), (D, A, 0.9))
    assert case.sequence.next_pass().tokens.tolist() == [A, B, C]
    case.absorb("commit", rows([B, E], [C, A], [E, D]))
    assert case.sequence.emitted == [A, B, C, E]
    assert case.acceptance.cycles == [(1, 2, False)]


def test_the_chain_of_a_narrow_tree_under_a_grammar_goes_on_with_the_best_candidates() -> None:
    """The tree has b alone. The chain a, b, d, e would have gone on, by its own rates."""
    case = ruled_tree("[a-e]{9,20}", 2, (B, C, 0.9), (D, E, 0.9), (E, D, 0.9))
    assert case.sequence.next_pass().tokens.tolist() == [A, B]
    case.absorb("commit", rows([B, C], [D, C]))
    assert case.acceptance.cycles == [(2, 2, False)]
    assert case.acceptance.trees == [(2, pytest.approx(-0.98))]


def test_the_chain_after_forced_tokens_goes_on_with_the_best_candidates() -> None:
    case = ruled_tree("aa[a-e]{9,20}", 2, (B, C, 0.9), (D, E, 0.9), (E, D, 0.9))
    assert case.sequence.next_pass().tokens.tolist() == [A, A, B]
    case.absorb("commit", rows([A, C], [B, C], [D, C]))
    assert case.acceptance.cycles == [(2, 2, False)]
    assert case.acceptance.trees == [(2, pytest.approx(-0.98))]


@pytest.mark.parametrize(("most_step", "nodes"), [(None, 6), (5, 5), (6, 6), (7, 6)])
def test_a_tree_under_a_grammar_has_no_more_nodes_than_a_step(most_step: int | None, nodes: int) -> None:
    case = Case("aa[a-e]{9,20}", block_length=8, tree_width=5)
    case.sequence._most_step = most_step
    case.acceptance.rates[:] = [1.0] * len(case.acceptance.rates)
    case.sequence.open_block(8)
    places = len(case.sequence.next_pass().rows)
    case.absorb("draft", of_probabilities(*[(B, C, 0.6)] * places))
    assert len(case.sequence.next_pass().tokens) == nodes


def test_a_tree_under_a_grammar_ends_at_the_length_limit() -> None:
    """Three tokens may follow, and each row yields one, so paths have two drafts."""
    case = Case("[a-e]{9,20}", block_length=4, tree_width=9, max_tokens=4)
    case.sequence.open_block(3)
    case.absorb("draft", of_probabilities((B, C, 0.6), (D, E, 0.6)))
    tree = case.sequence.next_pass().tree
    assert tree is not None
    assert max(tree.depths) == 2


def test_drafts_after_forced_tokens_end_at_the_length_limit() -> None:
    """Four tokens may follow, and each row yields one."""
    case = Case("aa[a-e]{9,20}", block_length=8, max_tokens=5)
    case.sequence.open_block(5)
    needed = case.sequence.next_pass()
    assert (needed.kind, needed.tokens.tolist()) == ("draft", [A, A, MASK, MASK])
