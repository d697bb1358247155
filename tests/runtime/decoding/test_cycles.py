"""What a cycle records and learns: its counts, its expected and emitted tokens, and what its drafts say of acceptance.

On scripted candidates, without an engine.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import pytest

from trimode import SamplingParams
from trimode.runtime.decoding.acceptance_rates import Acceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.lookup import Lookup, LookupAcceptance
from trimode.runtime.decoding.sequence import Moves, Sequence
from trimode.runtime.executor import Candidates
from trimode.runtime.request.outputs import Counts, Cycle

MASK, END = 100, 11


class Noted(Acceptance):
    """Notes what it observes."""

    def __init__(self) -> None:
        super().__init__()
        self.cycles: list[tuple[int, int, bool]] = []
        self.trees: list[tuple[int, float]] = []
        self.decays = 0

    def observe(self, accepted: int, tested: int, ended: bool) -> None:
        self.cycles.append((accepted, tested, ended))
        super().observe(accepted, tested, ended)

    def observe_tree(self, width: int, gained: float) -> None:
        self.trees.append((width, gained))
        super().observe_tree(width, gained)

    def forget_trees(self, cycles: int = 1) -> None:
        self.decays += cycles
        super().forget_trees(cycles)


class Case:
    """A sequence behind its prefill: 300 is pending."""

    def __init__(self, lookup: Lookup | None = None, begun: Many[int] = (), **options: Any) -> None:
        params = SamplingParams(**{"mode": "linear_spec", "block_length": 4, "max_tokens": 20} | options)
        self.acceptance, self.kept = Noted(), Noted()
        self.sequence = Sequence(
            [200],
            params,
            Ending(params, frozenset({END})),
            self.acceptance,
            context=100,
            mask_id=MASK,
            prefill_step=8,
            seed=0,
            kept_acceptance=self.kept,
            lookup=lookup,
            begun=begun,
        )
        self.sequence.absorb(self.sequence.next_pass(), certain([300]))

    def cycle(self, draft: list[int], commit: list[int], length: int = 4, **options: Any) -> Sequence:
        """One cycle: the draft's best tokens, and those of the causal rows."""
        self.sequence.open_block(length, **options)
        if draft:
            self.absorb("draft", certain(draft))
        self.absorb("commit", certain(commit))
        return self.sequence

    def absorb(self, kind: str, found: Candidates) -> None:
        needed = self.sequence.next_pass()
        assert needed.kind == kind
        assert len(needed.rows) == len(found.tokens)
        self.sequence.absorb(needed, found)


def certain(tokens: list[int]) -> Candidates:
    """The tokens have nearly all probability; the runner-up is 600."""
    return of_two([(token, 600) for token in tokens], 1.0)


def of_two(tokens: list[tuple[int, int]], probability: float) -> Candidates:
    """Two candidates a row, the first one with this probability."""
    logits = np.log(np.array([probability, max(1 - probability, 1e-6)], np.float32))
    rows = len(tokens)
    return Candidates(np.tile(logits, (rows, 1)), np.array(tokens), np.zeros(rows, np.float32))


@pytest.mark.parametrize(
    ("draft", "commit", "observed", "emitted", "rejected"),
    [
        ([301, 302, 303], [301, 999, 303, 304], (1, 2, False), [301, 999], [302, 303]),
        ([301, 302, 303], [998, 302, 303, 304], (0, 1, False), [998], [301, 302, 303]),
        ([301, 302, 303], [301, 302, 999, 304], (2, 3, False), [301, 302, 999], [303]),
        ([301, 302, 303], [301, 302, 303, 304], (3, 3, False), [301, 302, 303, 304], []),
        ([301, END, 303], [301, END, 303, 304], (2, 2, True), [301, END], []),
        ([301, 302, 303], [301, END, 303, 304], (1, 1, True), [301, END], []),
    ],
)
def test_a_chain(
    draft: list[int], commit: list[int], observed: tuple[int, int, bool], emitted: list[int], rejected: list[int]
) -> None:
    """Drafts behind the end of the text say nothing."""
    case = Case()
    expected = case.acceptance.yields()[3]
    found = case.cycle(draft, commit)
    assert case.acceptance.cycles == [observed]
    assert (case.kept.cycles, case.acceptance.trees, case.acceptance.decays) == ([], [], 0)
    assert found.cycles == [Cycle("draft", 4, 4, expected, len(emitted))]
    assert found.emitted == [300, *emitted]
    assert found.rejected == rejected
    assert found.counts == Counts(prefill=1, draft=1, commit=1, cycles=1, drafted=3, accepted=observed[0])
    assert found.committed == 1 + len(emitted)
    assert found.moves is None


def test_the_length_limit_is_no_end_of_the_text() -> None:
    case = Case(max_tokens=4)
    case.cycle([301, 302], [301, 302, 303], length=3)
    assert case.sequence.ending.finish_reason == "length"
    assert case.acceptance.cycles == [(2, 2, False)]


def test_a_cycle_without_drafts_observes_nothing() -> None:
    for mode in ("ar", "linear_spec", "auto"):
        case = Case(mode=mode, block_length=None)
        found = case.cycle([], [301], length=1)
        assert found.cycles == [Cycle("none", 1, 1, 1.0, 1)]
        assert found.counts == Counts(prefill=1, commit=1, cycles=1)
        assert (case.acceptance.cycles, case.kept.cycles) == ([], [])
        assert case.acceptance.decays == 0


def tree_case(probability: float = 0.6, **options: Any) -> Case:
    """The likeliest nodes are 301, 401 and 302 behind 301; 402 is the second candidate of the second place."""
    case = Case(**{"mode": "auto", "block_length": 8} | options)
    case.sequence.open_block(3, tree=True)
    case.sequence._tree_width = options.get("tree_width", 4)
    case.absorb("draft", of_two([(301, 401), (302, 402)], probability))
    return case


def test_a_tree_is_in_depth_first_order() -> None:
    needed = tree_case().sequence.next_pass()
    assert needed.tokens.tolist() == [300, 301, 302, 401]
    assert needed.tree is not None
    assert needed.tree.parents == [-1, 0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "emitted", "observed", "gained"),
    [
        # The chain alone would have yielded one token, and two.
        ([401, 0, 0, 999], [401, 999], (0, 1, False), 1.0),
        ([301, 999, 0, 0], [301, 999], (1, 2, False), 0.0),
        ([301, 302, 999, 0], [301, 302, 999], (2, 2, False), 0.0),
        ([999, 0, 0, 0], [999], (0, 1, False), 0.0),
        ([401, 0, 0, END], [401, END], (0, 1, True), 1.0),
        ([END, 0, 0, 0], [END], (0, 1, True), 0.0),
    ],
)
def test_a_tree_learns_what_its_chain_would_have_yielded(
    rows: list[int], emitted: list[int], observed: tuple[int, int, bool], gained: float
) -> None:
    case = tree_case()
    expected = case.acceptance.yields()[3] + case.acceptance.tree_gain(4)
    case.absorb("commit", certain(rows))
    found = case.sequence
    assert found.emitted == [300, *emitted]
    assert case.acceptance.cycles == [observed]
    assert case.acceptance.trees == [(4, gained)]
    assert found.cycles == [Cycle("tree", 3, 4, expected, len(emitted))]
    accepted = len(emitted) - 1
    assert found.counts == Counts(prefill=1, draft=1, commit=1, cycles=1, drafted=3, accepted=accepted, trees=1)
    assert found.moves == (Moves(2, [4]) if emitted[0] == 401 else None)
    assert found.committed == 1 + len(emitted)


def test_a_tree_of_auto_has_as_many_nodes_as_its_block_has_tokens() -> None:
    case = Case(mode="auto", block_length=8)
    case.sequence.open_block(4, tree=True)
    case.absorb("draft", of_two([(301, 401), (302, 402), (303, 403)], 0.6))
    assert case.sequence.next_pass().tokens.tolist() == [300, 301, 302, 401]


def test_a_fixed_tree_width_learns_of_the_chain_alone() -> None:
    case = tree_case(mode="linear_spec", tree_width=4)
    case.absorb("commit", certain([401, 0, 0, 999]))
    assert (case.acceptance.cycles, case.acceptance.trees, case.acceptance.decays) == ([(0, 1, False)], [], 0)


def test_a_tree_that_leaves_out_the_end_of_its_chain_may_have_lost_tokens() -> None:
    """Of the chain 301, 302, 303, the tree has 301 alone. 302 came, so 303 would have come with its own rate."""
    case = Case(mode="auto", block_length=8)
    case.sequence.open_block(4, tree=True)
    case.sequence._tree_width = 2
    case.absorb("draft", of_two([(301, 401), (302, 402), (303, 403)], 0.6))
    case.absorb("commit", certain([301, 302]))
    assert case.acceptance.cycles == [(2, 2, False)]
    assert case.acceptance.trees == [(2, pytest.approx(-0.8))]
    case = Case(mode="auto", block_length=8)
    case.sequence.open_block(5, tree=True)
    case.sequence._tree_width = 2
    case.absorb("draft", of_two([(301, 401), (302, 402), (303, 403), (304, 404)], 0.6))
    case.absorb("commit", certain([301, 302]))
    assert case.acceptance.trees == [(2, pytest.approx(-0.8 - 0.8**2))]


def test_rejected_drafts_of_a_tree_are_the_likeliest_path_behind_the_accepted_ones() -> None:
    case = tree_case()
    case.absorb("commit", certain([999, 0, 0, 0]))
    assert case.sequence.rejected == [301, 302]
    case = tree_case()
    case.absorb("commit", certain([401, 0, 0, 999]))
    assert case.sequence.rejected == []


def copies(prompt: list[int]) -> tuple[Lookup, LookupAcceptance]:
    acceptance = LookupAcceptance(Noted(), Noted())
    return Lookup(prompt, acceptance), acceptance


def test_a_copy_is_counted_apart_and_says_nothing_about_drafts() -> None:
    lookup, acceptance = copies([7, 8, 300, 301, 302, 303, 7, 8])
    case = Case(lookup)
    expected = acceptance.short.yields()[:5]
    assert case.sequence.look_up() == expected[:4]
    found = case.cycle([], [301, 302, 999, 304], looked_up=True)
    assert case.acceptance.cycles == []
    assert acceptance.short.cycles == [(2, 3, False)]  # type: ignore[attr-defined]
    assert acceptance.long.cycles == []  # type: ignore[attr-defined]
    assert found.cycles == [Cycle("copy", 4, 4, expected[3], 3)]
    assert found.counts == Counts(
        prefill=1, commit=1, cycles=1, drafted=3, accepted=2, lookups=1, copied=3, accepted_copies=2
    )
    assert found.rejected == [303]


def test_a_copy_that_was_found_is_compared_even_if_it_was_not_verified() -> None:
    lookup, acceptance = copies([7, 8, 300, 301, 302, 303, 7, 8])
    case = Case(lookup)
    case.acceptance.rates[:] = [0.5] * 31  # unlike those of copies
    expected = case.acceptance.yields()[3]
    case.sequence.look_up()
    case.cycle([401, 402, 403], [301, 999, 303, 304])
    assert case.sequence.cycles == [Cycle("draft", 4, 4, expected, 1)]
    assert acceptance.short.cycles == [(1, 1, False)]  # type: ignore[attr-defined]
    assert case.acceptance.cycles == [(0, 1, False)]
    assert case.sequence.counts.lookups == 0


@pytest.mark.parametrize(("max_tokens", "most_step", "most"), [(20, None, 3), (4, None, 2), (20, 3, 2), (2, None, 0)])
def test_a_copy_is_no_longer_than_the_block_may_be(max_tokens: int, most_step: int | None, most: int) -> None:
    lookup, _ = copies([7, 8, 300, 301, 302, 303, 304, 305, 7, 8])
    case = Case(lookup, max_tokens=max_tokens)
    case.sequence._most_step = most_step
    case.sequence.look_up()
    assert lookup.proposal == [301, 302, 303][:most]


def test_begun_tokens_are_committed_without_drafts_and_teach_nothing() -> None:
    case = Case(begun=[300, 301, 302, 303, 304, 305], max_tokens=7)
    assert case.sequence.replaying
    found = case.cycle([], [999] * 4)
    assert found.emitted == [300, 301, 302, 303, 304]
    assert found.replaying
    assert found.cycles == [Cycle("forced", 4, 4, 4, 4)]
    found = case.cycle([], [999, 306], length=2)
    assert found.emitted == [300, 301, 302, 303, 304, 305, 306]
    assert not found.replaying
    assert found.cycles[1] == Cycle("forced", 2, 2, 2, 2)
    assert found.origins == ["forced"] * 6 + ["bonus"]
    assert found.counts == Counts(prefill=1, commit=2, cycles=2)
    assert (case.acceptance.cycles, case.kept.cycles) == ([], [])


def test_begun_tokens_have_no_logprobs_and_those_behind_them_do() -> None:
    case = Case(begun=[300, 301], logprobs=0)
    found = case.cycle([], [301, 302], length=2)
    assert found.emitted == [300, 301, 302]
    assert [list(entry) for entry in found.logprobs] == [[], [], [302]]


def test_a_denoised_token_after_begun_ones_has_its_logprob() -> None:
    case = Case(mode="diffusion", begun=[300, 301, 302, 303, 304], logprobs=0)
    found = case.cycle([], [999])
    assert (found.emitted, found.replaying) == ([300, 301, 302, 303, 304], False)
    found.open_block(4)
    case.absorb("denoise", certain([401, 402, 403]))
    case.absorb("commit", certain([404]))
    assert found.emitted[5:] == [401, 402, 403, 404]
    assert [list(entry) for entry in found.logprobs] == [*[[]] * 5, [401], [402], [403], [404]]


def test_what_the_host_must_do_between_draft_and_commit() -> None:
    for options, on_host, candidates in (
        ({}, False, 1),
        ({"draft_threshold": 0.5}, True, 1),
        ({"tree_width": 6}, True, 8),
        ({"mode": "auto"}, False, 1),
        ({"mode": "diffusion"}, True, 1),
    ):
        found = Case(**options).sequence
        assert (found.drafts_on_host, found.draft_candidates) == (on_host, candidates)


def test_the_longest_block_ends_at_the_length_limit_or_in_diffusion_at_the_context() -> None:
    for mode in ("linear_spec", "auto", "diffusion"):
        assert Case(mode=mode, block_length=32, max_tokens=60).sequence.longest_block == 32
        assert Case(mode=mode, block_length=None, max_tokens=60).sequence.longest_block == 32
    assert Case(mode="ar", block_length=None).sequence.longest_block == 1
    assert Case(max_tokens=3).sequence.longest_block == 2
    assert Case(mode="diffusion", max_tokens=3).sequence.longest_block == 4
    assert Case(mode="diffusion", block_length=99, max_tokens=99).sequence.longest_block == 99
    assert Case(mode="diffusion", block_length=100, max_tokens=99).sequence.longest_block == 99


def test_a_threshold_refines_the_draft_until_every_token_is_probable() -> None:
    """The most confident token is settled in every pass."""
    case = Case(draft_threshold=0.7)
    case.sequence.open_block(4)
    for confidences, masks in (((0.7, 0.5, 0.6), [2, 3]), ((0.5, 0.6), [2])):
        needed = case.sequence.next_pass()
        probabilities = np.array(confidences, np.float32)
        found = Candidates(
            np.log(np.stack([probabilities, 1 - probabilities], axis=1)),
            np.array([[300 + row, 600] for row in needed.rows.tolist()]),
            np.zeros(len(needed.rows), np.float32),
        )
        case.sequence.absorb(needed, found)
        assert case.sequence.next_pass().rows.tolist() == masks
        assert case.sequence.fills_block
    case.absorb("draft", certain([302]))
    assert case.sequence.next_pass().tokens.tolist() == [300, 301, 302, 303]
    assert not case.sequence.fills_block


def test_prompt_logprobs_need_short_passes_of_all_rows_and_more_candidates() -> None:
    params = SamplingParams(mode="ar", max_tokens=3, prompt_logprobs=5)
    prompt = list(range(200, 200 + 135))
    sequence = Sequence(
        prompt, params, Ending(params, frozenset()), Acceptance(), context=999, mask_id=MASK, prefill_step=500, seed=0
    )
    first = sequence.next_pass()
    assert (first.kind, first.tokens.tolist(), first.rows.tolist()) == ("prefill", prompt[:128], list(range(128)))
    assert first.asked is not None
    assert first.asked.tolist() == [[token] for token in prompt[1:129]]
    assert sequence.candidates == 5
    rows = 128
    asked = np.zeros((rows, 1), np.float32)
    sequence.absorb(first, certain([token % 7 for token in range(rows)])._replace(asked_logits=asked))
    second = sequence.next_pass()
    assert (second.tokens.tolist(), second.rows.tolist()) == (prompt[128:134], list(range(6)))
    sequence.absorb(second, certain([0] * 6)._replace(asked_logits=asked[:6]))
    last = sequence.next_pass()
    assert (last.tokens.tolist(), last.rows.tolist(), last.asked) == (prompt[134:], [0], None)
    sequence.absorb(last, certain([300]))
    assert sequence.candidates == 1
    assert sequence.prompt_logprobs is not None
    assert len(sequence.prompt_logprobs) == len(prompt)
    assert sequence.prompt_logprobs[1] == {201: (0.0, None), 0: (0.0, 1), 600: (pytest.approx(np.log(1e-6)), 2)}
    assert sequence.emitted == [300]


def test_blocks_of_diffusion_are_cycles_without_drafts() -> None:
    """A block that ends the text needs no commit, and counts."""
    case = Case(mode="diffusion")
    case.sequence.open_block(4)
    case.absorb("denoise", certain([301, 302, 303]))
    case.absorb("commit", certain([304]))
    assert case.sequence.counts == Counts(prefill=1, denoise=1, commit=1, cycles=1)
    assert (case.sequence.committed, case.sequence.emitted) == (5, [300, 301, 302, 303, 304])
    case.sequence.open_block(4)
    case.absorb("denoise", certain([401, END, 403]))
    assert case.sequence.counts == Counts(prefill=1, denoise=2, commit=1, cycles=2)
    assert case.sequence.emitted == [300, 301, 302, 303, 304, 401, END]
    assert case.sequence.origins == ["prefill", *["denoised"] * 3, "bonus", *["denoised"] * 2]
    assert case.sequence.cycles == []
    assert case.acceptance.cycles == []
