"""Blocks under a grammar of letters, without an engine: repaired drafts, forced tokens, and the rows that get masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from tests.support.ruled_language import LETTERS, rules
from trimode import SamplingParams
from trimode.runtime.decoding.acceptance_rates import Acceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.ruled_rows import AgainRate
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.executor import Candidates
from trimode.runtime.request.outputs import Counts, Cycle

MASK, END = 0, 1
A, B, C, D, E = range(2, 7)


def rows(*tokens: list[int]) -> Candidates:
    """The candidates of each row, best first."""
    most = len(tokens[0])
    logits = np.tile(np.arange(most, 0, -1, dtype=np.float32), (len(tokens), 1))
    return Candidates(logits, np.array(tokens), np.full(len(tokens), most + 0.1, np.float32))


def begun(expression: str, first: int, again_rate: AgainRate | None = None, **options: Any) -> Sequence:
    """An answer whose first token has come."""
    params = SamplingParams(**{"mode": "linear_spec", "block_length": 4, "max_tokens": 20} | options)
    sequence = Sequence(
        [5],
        params,
        Ending(params, frozenset({END})),
        Acceptance(),
        context=50,
        mask_id=MASK,
        prefill_step=8,
        seed=0,
        rules=rules(LLMatcher(LETTERS.tokenizer, LLMatcher.grammar_from_regex(expression))),
        again_rate=again_rate,
    )
    sequence.absorb(sequence.next_pass(), rows([first]))
    return sequence


def masked_rows(masks: Any) -> list[int]:
    return [] if masks is None else [row for row, words in enumerate(masks) if (words != ~np.uint32(0)).any()]


@pytest.mark.parametrize(
    ("expression", "length", "draft", "block", "masked"),
    [
        ("[a-e]{2,9}", 4, [[B, C], [C, D], [D, E]], [A, B, C, D], []),
        ("[a-c]{2,9}", 4, [[D, B], [C, D], [E, B]], [A, B, C, B], []),  # the best legal candidate of each place
        ("[a-c]{2,9}", 4, [[B, C], [D, E], [B, C]], [A, B], [1]),  # the second place has none
        ("a(bcde[ab]|cc)", 2, [[B, C]], [A, B, C, D, E], [4]),  # of what no draft has seen, the last row
        ("a[bc][a-c]de[a-c]", 3, [[C, B], [E, B]], [A, C, B, D, E], [4]),
        ("a[bc]d[ab]{2,5}", 4, [[B, C], [E, E], [A, B]], [A, B, D, A], []),  # d is forced in the draft's place
        ("a[bc]d", 4, [[B, C], [D, E], [A, B]], [A, B, D, END], []),
        ("a[b-e]", 4, [[B, C], [D, E], [A, B]], [A, B, END], []),
    ],
)
def test_a_draft_is_repaired(
    expression: str, length: int, draft: list[list[int]], block: list[int], masked: list[int]
) -> None:
    sequence = begun(expression, A)
    sequence.open_block(length)
    needed = sequence.next_pass()
    assert needed.kind == "draft"
    sequence.absorb(needed, rows(*draft))
    commit = sequence.next_pass()
    assert commit.tokens.tolist() == block
    assert masked_rows(commit.masks) == masked


class RecordedRate(AgainRate):
    """Masks never come at once. seen: what it was told."""

    pays = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def observe(self, masked: int, again: int, enough: int) -> None:
        self.seen.append((masked, again, enough))


@pytest.mark.parametrize(
    ("options", "best", "seen"),
    [
        ({}, E, [(0, 1, 0)]),
        ({}, B, [(0, 0, 1)]),
        ({"temperature": 1.0}, B, []),
        ({"repetition_penalty": 1.1}, B, []),
    ],
)
def test_doubtful_rows_are_counted_where_one_candidate_is_enough(
    options: dict[str, Any], best: int, seen: list[tuple[int, int, int]]
) -> None:
    """Where more are needed, all rows have masks. e is not legal."""
    rate = RecordedRate()
    sequence = begun("[a-c]{2,9}", A, rate, **options)
    rate.seen.clear()
    sequence.open_block(1)
    sequence.absorb(sequence.next_pass(), rows([best]))
    assert rate.seen == seen


@pytest.mark.parametrize(
    ("max_tokens", "block"), [(20, [A, B, C, D, E]), (5, [A, B, C, D]), (4, [A, B, C]), (3, [A, B])]
)
def test_forced_tokens_end_at_the_length_limit(max_tokens: int, block: list[int]) -> None:
    """The first token has come, and each row of a block yields one."""
    sequence = begun("a(bcde[ab]|cc)", A, max_tokens=max_tokens)
    sequence.open_block(2)
    sequence.absorb(sequence.next_pass(), rows([B, C]))
    assert sequence.next_pass().tokens.tolist() == block


@pytest.mark.parametrize(("most_step", "block"), [(None, [A, B, C, D, E]), (5, [A, B, C, D, E]), (3, [A, B, C])])
def test_forced_tokens_end_at_the_longest_step(most_step: int | None, block: list[int]) -> None:
    sequence = begun("abcde[ab]{3}", A)
    sequence._most_step = most_step
    sequence.open_block(1)
    commit = sequence.next_pass()
    assert (commit.kind, commit.tokens.tolist()) == ("commit", block)


def test_a_draft_that_is_rejected_after_a_forced_token_is_no_accepted_one() -> None:
    sequence = begun("ab[ab]{4,9}", A, block_length=8)
    sequence.open_block(8)
    sequence.absorb(sequence.next_pass(), rows(*[[A, B]] * 7))
    commit = sequence.next_pass()
    assert commit.tokens.tolist() == [A, B, *[A] * 7]
    before = list(sequence.acceptance.rates)
    sequence.absorb(commit, rows([B], [B], *[[A]] * 7))
    assert sequence.origins == ["forced", "forced", "bonus"]
    assert sequence.acceptance.rates == pytest.approx([0.9 * before[0], *before[1:]])


def test_forced_tokens_are_no_drafts() -> None:
    sequence = begun("a(bcde[ab]{3}|cc)", A)
    sequence.open_block(2)
    sequence.absorb(sequence.next_pass(), rows([B, C]))
    expected = sequence.acceptance.yields()[4]
    before = list(sequence.acceptance.rates)
    sequence.absorb(sequence.next_pass(), rows([B], [C], [D], [E], [A]))
    assert sequence.emitted == [A, B, C, D, E, A]
    assert sequence.origins == ["forced", "accepted", "forced", "forced", "forced", "bonus"]
    assert sequence.counts == Counts(prefill=1, draft=1, commit=1, cycles=1, drafted=1, accepted=1)
    assert sequence.cycles == [Cycle("draft", 2, 5, expected, 5)]
    assert sequence.acceptance.rates == pytest.approx([before[0] + 0.1 * (1 - before[0]), *before[1:]])


@pytest.mark.parametrize(("logprobs", "emitted"), [(None, [A, B, END]), (0, [A, B])])
def test_the_end_of_a_complete_grammar_needs_no_pass(logprobs: int | None, emitted: list[int]) -> None:
    """But its log-probability does."""
    sequence = begun("a[bc]", A, logprobs=logprobs)
    sequence.open_block(1)
    commit = sequence.next_pass()
    asked = None if logprobs is None else np.zeros((1, 1), np.float32)
    sequence.absorb(commit, rows([B, C])._replace(asked_logits=asked))
    assert sequence.emitted == emitted
    assert (sequence.ending.finish_reason is None) == (logprobs is not None)


def test_an_illegal_draft_is_replaced_by_a_candidate_of_the_latest_pass() -> None:
    """The first pass settles only the first position. e is not legal."""
    sequence = begun("[a-d]{2,9}", A, draft_threshold=0.9)
    sequence.open_block(3)
    unsure = rows([B, C], [E, C])
    unsure.log_sum_exp[1] += 2.0
    sequence.absorb(sequence.next_pass(), unsure)
    again = sequence.next_pass()
    assert (again.kind, again.rows.tolist()) == ("draft", [2])
    sequence.absorb(again, rows([E, D]))
    assert sequence.next_pass().tokens.tolist() == [A, B, D]


def test_a_row_without_a_legal_candidate_is_run_again_alone() -> None:
    sequence = begun("a[b-e][ab]", A)
    sequence.open_block(2)
    sequence.absorb(sequence.next_pass(), rows([C, D]))
    commit = sequence.next_pass()
    assert masked_rows(commit.masks) == []
    sequence.absorb(commit, rows([C, D], [E, D]))
    assert sequence.runs_again
    again = sequence.next_pass()
    assert (again.kind, again.rows.tolist(), masked_rows(again.masks)) == ("commit", [1], [0])
    sequence.absorb(again, rows([B, A]))
    assert not sequence.runs_again
    assert sequence.emitted == [A, C, B, END]
    assert sequence.counts.commit == 2


def test_ar_takes_forced_tokens_one_by_one() -> None:
    sequence = begun("abcde", A, mode="ar", block_length=None)
    sequence.open_block(1)
    assert sequence.next_pass().tokens.tolist() == [A]


@pytest.mark.parametrize(
    ("options", "candidates"), [({}, 16), ({"logprobs": 20}, 20), ({"temperature": 1.0}, None), ({"top_k": 5}, None)]
)
def test_rules_need_more_candidates(options: dict[str, Any], candidates: int | None) -> None:
    sequence = begun("[a-e]{2,9}", A)
    sequence.params = SamplingParams(mode="linear_spec", block_length=4, max_tokens=20, **options)
    assert (sequence.candidates, sequence.draft_candidates, sequence.drafts_on_host) == (candidates, 16, True)
