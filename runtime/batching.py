"""Which sequences share a pass, and the step they make together.

A pass covers a run of neighbouring slots. Sequences that need it may have others between them that do not; those go
along as padding, or the pass is cut in two, whichever costs less by :mod:`trimode.runtime.pass_cost`. The same choice
keeps one-token steps and long prefill chunks apart where padding would cost more than another pass.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np

from trimode.runtime.decoding import Pass
from trimode.runtime.executor import BidirectionalStep, CausalStep, Ints
from trimode.runtime.pass_cost import EngineName, PassCost


class Member(NamedTuple):
    """A sequence that needs a pass. adapter: whether a draft of it uses the draft adapter. candidates: of each row that
    it needs, None for all.
    """

    slot: int
    needed: Pass
    adapter: bool
    candidates: int | None


class Span(NamedTuple):
    """Slots ``first`` to ``last`` in one pass of ``step`` tokens each."""

    first: int
    last: int
    step: int
    members: list[Member]

    @property
    def batch(self) -> int:
        return self.last - self.first + 1


def plan_spans(
    members: list[Member], committed: Many[int], capacity: int, engine: EngineName, cost: PassCost
) -> list[Span]:
    """Cut the members, in order of their slots, into the passes that cost least together.

    committed: KV rows of every active slot. No pass reaches past ``capacity``, padding included: a slot too full for
    its neighbours' step has a pass of its own.
    """
    if _alike(members) and _fits(whole := _span(members), committed, capacity):
        return [whole]
    # best[i]: the least seconds for the first i members, and the span that ends there.
    best: list[tuple[float, Span | None]] = [(0.0, None)]
    for end in range(1, len(members) + 1):
        choices = []
        for start in range(end):
            span = _span(members[start:end])
            if start == end - 1 or _fits(span, committed, capacity):
                choices.append((best[start][0] + cost.seconds(engine, span.batch, span.step), start, span))
        seconds, _, span = min(choices, key=lambda choice: choice[:2])
        best.append((seconds, span))
    spans: list[Span] = []
    end = len(members)
    while (ending := best[end][1]) is not None:
        spans.append(ending)
        end -= len(ending.members)
    return spans[::-1]


def causal_step(span: Span, committed: Many[int]) -> CausalStep:
    """The span as a pass of the AR engine; padding writes past the committed rows, where the next pass writes anew."""
    ids, rows, write = _arrays(span, committed)
    return CausalStep.chain(span.first, ids, write, rows, _candidates(span))


def bidirectional_step(span: Span, committed: Many[int]) -> BidirectionalStep:
    """The span as a pass of the diffusion engine."""
    ids, rows, write = _arrays(span, committed)
    lengths, adapter = np.ones(span.batch, np.int64), np.zeros(span.batch, np.bool_)
    for member in span.members:
        lengths[member.slot - span.first] = len(member.needed.tokens)
        adapter[member.slot - span.first] = member.adapter
    return BidirectionalStep.block(span.first, ids, write, rows, lengths, adapter, _candidates(span))


def _arrays(span: Span, committed: Many[int]) -> tuple[Ints, Ints, Ints]:
    """input_ids [B, S], logit_rows [B, R], write_indices [B]."""
    ids = np.zeros((span.batch, span.step), np.int64)
    rows = np.zeros((span.batch, max(len(member.needed.rows) for member in span.members)), np.int64)
    for slot, needed, _, _ in span.members:
        ids[slot - span.first, : len(needed.tokens)] = needed.tokens
        rows[slot - span.first, : len(needed.rows)] = needed.rows
    return ids, rows, np.array(committed[span.first : span.last + 1], np.int64)


def _candidates(span: Span) -> int | None:
    wanted = [member.candidates for member in span.members]
    return None if None in wanted else max(each for each in wanted if each is not None)


def _alike(members: list[Member]) -> bool:
    """Neighbours with steps of one length: no padding, so nothing to choose."""
    first, last = members[0], members[-1]
    return last.slot - first.slot == len(members) - 1 and all(
        len(member.needed.tokens) == len(first.needed.tokens) for member in members
    )


def _span(members: list[Member]) -> Span:
    step = max(len(member.needed.tokens) for member in members)
    return Span(members[0].slot, members[-1].slot, step, members)


def _fits(span: Span, committed: Many[int], capacity: int) -> bool:
    return max(committed[span.first : span.last + 1]) + span.step <= capacity
