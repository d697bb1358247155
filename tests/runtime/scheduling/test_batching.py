"""Which sequences share a pass, compared with all possible ways to split them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.runtime.decoding.draft_tree import DraftTree
from trimode.runtime.decoding.sequence import Pass
from trimode.runtime.executor import CausalStep
from trimode.runtime.scheduling.batching import (
    Member,
    Span,
    bidirectional_step,
    causal_step,
    chosen_among,
    plan_spans,
    span_of,
)
from trimode.runtime.scheduling.pass_cost import EngineName, PassCost

CAPACITY = 40


def machine(per_token: float) -> PassCost:
    cost = PassCost(16, 32)

    def seconds(_: EngineName, batch: int, step: int) -> float:
        return 1.0 + per_token * batch * step

    cost.measure(seconds, seconds=1e9)
    return cost


def member(slot: int, length: int) -> Member:
    needed = Pass("commit", np.arange(1, length + 1), np.arange(length))
    return Member(slot, needed, adapter=slot % 2 == 0, candidates=1, draft_candidates=1)


def total(cuts: list[list[Member]], committed: list[int], cost: PassCost) -> float:
    """Seconds of these passes; infinity if a pass of several members reaches past the capacity."""
    seconds = 0.0
    for cut in cuts:
        step = max(len(each.needed.tokens) for each in cut)
        first, last = cut[0].slot, cut[-1].slot
        if len(cut) > 1 and max(committed[first : last + 1]) + step > CAPACITY:
            return float("inf")
        seconds += cost.seconds("ar", last - first + 1, step)
    return seconds


requests = st.lists(st.one_of(st.none(), st.integers(1, 12)), min_size=1, max_size=7).filter(any)


@settings(max_examples=200, deadline=None)
@given(lengths=requests, per_token=st.sampled_from([0.001, 0.05, 0.3, 2.0]), data=st.data())
def test_no_other_cut_costs_less(lengths: list[int | None], per_token: float, data: st.DataObject) -> None:
    """None: a slot whose sequence needs no such pass."""
    cost = machine(per_token)
    committed = [data.draw(st.integers(0, CAPACITY - (length or 0))) for length in lengths]
    members = [member(slot, length) for slot, length in enumerate(lengths) if length is not None]
    spans = plan_spans(members, committed, CAPACITY, "ar", cost)
    assert sorted(each.slot for span in spans for each in span.members) == [each.slot for each in members]
    found = sum(cost.seconds("ar", span.batch, span.step) for span in spans)
    rows = list(committed)
    for span in spans:
        assert span == span_of(span.members)
        assert span.batch == 1 or max(rows[span.first : span.last + 1]) + span.step <= CAPACITY
        for each in span.members:
            rows[each.slot] += len(each.needed.tokens)
    places = range(1, len(members))
    for chosen in itertools.chain.from_iterable(itertools.combinations(places, k) for k in range(len(members))):
        bounds = [0, *chosen, len(members)]
        cuts = [members[begin:end] for begin, end in itertools.pairwise(bounds)]
        assert found <= total(cuts, committed, cost) * (1 + 1e-9)


def test_neighbours_with_steps_of_one_length_share_a_pass_at_any_cost() -> None:
    """So the plan does not depend on measured costs where no pass has padding."""
    cost = machine(0.05)
    cost.seconds = None  # type: ignore[assignment,method-assign]
    members = [member(2, 3), member(3, 3), member(4, 3)]
    assert plan_spans(members, [0] * 5, CAPACITY, "ar", cost) == [Span(2, 4, 3, members)]


@pytest.mark.parametrize("longest", [1, 4])
def test_short_steps_share_a_pass_although_prefills_are_between_them(longest: int) -> None:
    """Their padding is cheap. They come first, since a prefill may leave no room for it."""
    cost = machine(0.1)
    members = [member(slot, 12 if slot in (2, 5) else max(1, longest - slot % 2)) for slot in range(8)]
    short, *prefills = plan_spans(members, [CAPACITY - 12] * 8, CAPACITY, "ar", cost)
    assert short == Span(0, 7, longest, [each for each in members if each.slot not in (2, 5)])
    assert [(span.first, span.last, span.step) for span in prefills] == [(2, 2, 12), (5, 5, 12)]


def test_passes_in_doubt_are_not_tried() -> None:
    """Beside a long prefill, padding is dear, however long ago that was measured."""
    cost = machine(2.0)
    members = [member(0, 1), member(1, 12), member(2, 1)]
    before = plan_spans(members, [0] * 3, CAPACITY, "ar", cost)
    for _ in range(3000):
        cost.observe("ar", 1, 1, 3.0)
    assert cost.least_seconds("ar", 3, 12) < cost.seconds("ar", 3, 12) / 10
    assert [len(span.members) for span in before] == [1, 1, 1]
    assert plan_spans(members, [0] * 3, CAPACITY, "ar", cost) == before


def test_a_pass_returns_the_candidates_of_the_member_that_needs_most() -> None:
    """A draft needs one, whatever its text needs."""
    one, three, every = (member(slot, 2)._replace(candidates=number) for slot, number in enumerate((1, 3, None)))
    draft = every._replace(needed=every.needed._replace(kind="draft"))
    committed = [0, 0, 0]
    for members, chosen, drafted in (
        ([one], 1, 1),
        ([one, three], 3, 3),
        ([one, three, every], None, None),
        ([draft], None, 1),
        ([three, draft], None, 3),
    ):
        span = span_of(members)
        assert chosen_among(span) == causal_step(span, committed).top_k == chosen
        assert bidirectional_step(span, committed).top_k == drafted


def test_a_step_carries_asked_ids_without_masks() -> None:
    """Of the members that ask; the others' are padding."""
    asked = np.array([[7, 8], [9, 10]])
    asking = member(1, 2)
    members = [member(0, 2), asking._replace(needed=asking.needed._replace(asked=asked))]
    step = causal_step(span_of(members), [0, 0])
    assert step.token_mask is None
    assert step.asked_ids is not None
    assert step.asked_ids[1].tolist() == asked.tolist()
    assert causal_step(span_of(members[:1]), [0, 0]).asked_ids is None


def test_masks_of_members_lie_in_their_own_rows_and_all_else_is_legal() -> None:
    """Members have different numbers of rows, and some have no masks. Asked ids are padded with token 0."""
    every = int(~np.uint32(0))
    three, none, one = member(4, 3), member(5, 2), member(6, 1)
    masks = np.arange(6, dtype=np.uint32).reshape(3, 2)
    asked = np.array([[7, 8], [9, 10], [11, 12]])
    three = three._replace(needed=three.needed._replace(masks=masks, asked=asked))
    one = one._replace(needed=one.needed._replace(masks=masks[:1] + 9, asked=asked[:1, :1]))
    step = causal_step(span_of([three, none, one]), [0] * 7)
    assert step.token_mask is not None
    assert step.token_mask.tolist() == [masks.tolist(), [[every] * 2] * 3, [[9, 10], [every] * 2, [every] * 2]]
    assert step.asked_ids is not None
    assert step.asked_ids.tolist() == [asked.tolist(), [[0, 0]] * 3, [[7, 0], [0, 0], [0, 0]]]
    only = causal_step(span_of([none, one._replace(needed=one.needed._replace(asked=None))]), [0] * 7)
    assert only.asked_ids is None
    assert only.token_mask is not None


def test_a_tree_stands_at_its_depths_behind_the_committed_rows_and_sees_its_ancestors() -> None:
    """The members beside it are chains, and so is the padding behind it, which sees no node."""
    tree = DraftTree.depth_first([300, 301, 302, 401], [-1, 0, 1, 0])[0]
    chain, branching = member(2, 5), member(3, 4)
    branching = branching._replace(needed=branching.needed._replace(tree=tree))
    step = causal_step(span_of([chain, branching]), [0, 0, 6, 9])
    assert step.position_ids.tolist() == [[6, 7, 8, 9, 10], [9, 10, 11, 10, 13]]
    causal = np.tril(np.ones((5, 5), np.bool_))
    assert (step.block_mask[0] == causal).all()
    expected = causal.copy()
    expected[:, :4] = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    assert (step.block_mask[1] == expected).all()
    assert (CausalStep.chain(0, step.input_ids, step.write_indices, step.logit_rows).block_mask[1] == causal).all()


def test_a_draft_uses_the_adapter_of_its_own_sequence() -> None:
    members = [member(slot, 2) for slot in (4, 5)]
    assert bidirectional_step(span_of(members), [0] * 6).adapter.tolist() == [True, False]


def test_equal_members_that_reach_past_the_rows_do_not_share_a_pass() -> None:
    members = [member(0, 3), member(1, 3)]
    for committed, spans in (([37, 5], 1), ([38, 5], 2), ([5, 37], 1), ([5, 38], 2)):
        assert len(plan_spans(members, committed, CAPACITY, "ar", machine(0.05))) == spans
    apart = [member(0, 3), member(2, 3)]  # the slot between is full
    assert len(plan_spans(apart, [0, 38, 0], CAPACITY, "ar", machine(0.05))) == 2
    assert len(plan_spans(apart, [0, 37, 0], CAPACITY, "ar", machine(0.05))) == 1


def test_steps_carry_each_member_and_leave_the_rest_as_padding() -> None:
    members = [member(1, 3), member(3, 2)]
    span = Span(1, 3, 3, members)
    committed = [9, 5, 7, 2]
    for step in (causal_step(span, committed), bidirectional_step(span, committed)):
        assert step.first_slot == 1
        assert step.input_ids.tolist() == [[1, 2, 3], [0, 0, 0], [1, 2, 0]]
        assert step.write_indices.tolist() == [5, 7, 2]
        assert step.position_ids.tolist() == [[5, 6, 7], [7, 8, 9], [2, 3, 4]]
        assert step.logit_rows.tolist() == [[0, 1, 2], [0, 0, 0], [0, 1, 0]]
        assert step.top_k == 1
    assert chosen_among(span) == 1
    drafted = bidirectional_step(span, committed)
    assert drafted.step_lengths.tolist() == [3, 1, 2]
    assert drafted.adapter.tolist() == [False, False, False]
