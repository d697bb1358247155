"""Which sequences share a pass, and the step that they form.

A pass covers neighbouring slots. Slots between its sequences that do not need the pass are padding, or the pass is
split in two, whichever is expected to cost less by :mod:`trimode.runtime.scheduling.pass_cost`. The same rule separates
one-token steps from long prefill chunks where padding would cost more than another pass; steps of one token then share
a pass even if prefills are between them. Passes in doubt are not tried: a padded prefill of a large batch may take as
long as many cycles.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decoding.sequence import Pass
from trimode.runtime.executor import BidirectionalStep, CausalStep, Ints, Words, causal_mask, places
from trimode.runtime.scheduling.pass_cost import EngineName, PassCost


class Member(NamedTuple):
    """A sequence that needs a pass. adapter: whether its drafts use the draft adapter.

    candidates, draft_candidates: the numbers that the choice of a text's token and of a draft's need, None for all.
    """

    slot: int
    needed: Pass
    adapter: bool
    candidates: int | None
    draft_candidates: int | None


class Span(NamedTuple):
    """Slots ``first`` to ``last`` in one pass of ``step`` tokens each. Slots without a member are padding."""

    first: int
    last: int
    step: int
    members: list[Member]

    @property
    def batch(self) -> int:
        return self.last - self.first + 1


def plan_spans(
    members: list[Member], committed: Many[int], most_rows: int, engine: EngineName, cost: PassCost
) -> list[Span]:
    """The passes that take the least time together, in the order in which they must run. The members are cut by their
    slots, or they are divided into those with steps of at most 1, 2, 4, ... tokens and those with longer ones, and both
    are cut by their slots. A pass is assumed to take longer with more sequences and with a longer step.

    committed: KV rows of every active slot. most_rows: rows that a slot may have. No pass reaches past it, padding
    included: a slot too full for its neighbours' step gets a pass of its own.
    """
    blocks = _blocks(members, committed, most_rows)
    if len(blocks) == 1:
        return [span_of(members)]
    seconds_of = cache(lambda batch, step: cost.seconds(engine, batch, step))
    plans = [_cut(blocks, committed, most_rows, seconds_of)]
    for exponent in sorted({(_step(block) - 1).bit_length() for block in blocks})[:-1]:
        short = [member for member in members if len(member.needed.tokens) <= 1 << exponent]
        long = [member for member in members if len(member.needed.tokens) > 1 << exponent]
        first = _cut(_blocks(short, committed, most_rows), committed, most_rows, seconds_of)
        second = _cut(_blocks(long, committed, most_rows), _after(short, committed), most_rows, seconds_of)
        plans.append(_Cut(first.seconds + second.seconds, first.spans + second.spans))
    return min(plans, key=lambda plan: plan.seconds).spans


def _after(members: list[Member], committed: Many[int]) -> list[int]:
    """The most rows that the slots may have when the members' passes have run."""
    rows = list(committed)
    for member in members:
        rows[member.slot] += len(member.needed.tokens)
    return rows


class _Cut(NamedTuple):
    """Passes, and the seconds that they take together."""

    seconds: float
    spans: list[Span]


def _blocks(members: list[Member], committed: Many[int], most_rows: int) -> list[list[Member]]:
    """The members in runs of neighbours with steps of one length, which share a pass: it has no padding. A slot that is
    too full for its own step is alone.
    """
    blocks: list[list[Member]] = []
    too_full = {each.slot for each in members if committed[each.slot] + len(each.needed.tokens) > most_rows}
    for member in members:
        step = len(member.needed.tokens)
        if (
            blocks
            and (last := blocks[-1][-1]).slot + 1 == member.slot
            and len(last.needed.tokens) == step
            and too_full.isdisjoint((last.slot, member.slot))
        ):
            blocks[-1].append(member)
        else:
            blocks.append([member])
    return blocks


def _step(block: list[Member]) -> int:
    return len(block[0].needed.tokens)


def _cut(
    blocks: list[list[Member]], committed: Many[int], most_rows: int, seconds_of: Callable[[int, int], float]
) -> _Cut:
    """The blocks, in order of their slots, cut into the passes that take the least time together."""
    # Of each block: its first slot, its step, and the most rows of its slots and of those up to the next block.
    ends = [*[block[0].slot for block in blocks[1:]], blocks[-1][-1].slot + 1]
    parts = [
        (block[0].slot, _step(block), max(committed[block[0].slot : end]))
        for block, end in zip(blocks, ends, strict=True)
    ]
    # Of the first blocks: the least seconds, by their number from 0 on; where the last span of them begins, from 1 on.
    least, begins = [0.0], list[int]()
    for end, block in enumerate(blocks, start=1):
        last, (first, step, _) = block[-1].slot, parts[end - 1]
        highest = max(committed[first : last + 1])
        best, begin = least[-1] + seconds_of(last - first + 1, step), end - 1
        for start in range(end - 2, -1, -1):
            first, own_step, rows = parts[start]
            step, highest = max(step, own_step), max(highest, rows)
            if highest + step > most_rows:
                break
            seconds = seconds_of(last - first + 1, step)
            if seconds > best:  # and longer spans take longer
                break
            if least[start] + seconds <= best:
                best, begin = least[start] + seconds, start
        least.append(best)
        begins.append(begin)
    spans: list[Span] = []
    end = len(blocks)
    while end:
        begin = begins[end - 1]
        spans.append(span_of([member for block in blocks[begin:end] for member in block]))
        end = begin
    return _Cut(least[-1], spans[::-1])


def causal_step(span: Span, committed: Many[int]) -> CausalStep:
    """The span as a pass of the AR engine. Padding writes past the committed rows, where the next pass writes again."""
    ids, rows, write = _arrays(span, committed)
    depths, mask = _trees(span)
    return CausalStep(
        span.first,
        ids,
        write[:, None] + depths,
        write,
        rows,
        mask,
        top_k=chosen_among(span),
        token_mask=_masks(span, rows.shape),
        asked_ids=_asked(span, rows.shape),
    )


def _trees(span: Span) -> tuple[Ints, NDArray[np.bool_]]:
    """Depths of the tokens, [S] or [B, S], and which tokens of the step each one sees, [B, S, S]: itself and its
    ancestors. Members without a tree and padding are chains.
    """
    trees = [(member.slot - span.first, tree) for member in span.members if (tree := member.needed.tree) is not None]
    before = causal_mask(span.batch, span.step)
    if not trees:
        return places(span.step), before
    depths = [list(range(span.step))] * span.batch
    ends = [[span.step] * span.step] * span.batch
    for index, tree in trees:
        depths[index] = tree.depths + depths[index][len(tree) :]
        ends[index] = tree.ends + ends[index][len(tree) :]
    # A node comes behind its ancestors and before their ends.
    return np.array(depths), before & (places(span.step)[:, None] < np.array(ends)[:, None])


def bidirectional_step(span: Span, committed: Many[int]) -> BidirectionalStep:
    """The span as a pass of the diffusion engine."""
    ids, rows, write = _arrays(span, committed)
    lengths, adapter = [1] * span.batch, [False] * span.batch
    for member in span.members:
        lengths[member.slot - span.first] = len(member.needed.tokens)
        adapter[member.slot - span.first] = member.adapter
    wanted = [
        member.draft_candidates if member.needed.kind == "draft" else member.candidates for member in span.members
    ]
    return BidirectionalStep.block(span.first, ids, write, rows, np.array(lengths), np.array(adapter), _most(wanted))


def chosen_among(span: Span) -> int | None:
    """Candidates that a row needs in the pass that chooses the texts' tokens; None for all."""
    return _most([member.candidates for member in span.members])


def _most(wanted: list[int | None]) -> int | None:
    """The largest number; None, for all, is larger than any."""
    return None if None in wanted else max(number for number in wanted if number is not None)


def _arrays(span: Span, committed: Many[int]) -> tuple[Ints, Ints, Ints]:
    """input_ids [B, S], logit_rows [B, R], write_indices [B]."""
    ids = np.zeros((span.batch, span.step), np.int64)
    rows = np.zeros((span.batch, max(len(member.needed.rows) for member in span.members)), np.int64)
    for member in span.members:
        needed, index = member.needed, member.slot - span.first
        ids[index, : len(needed.tokens)] = needed.tokens
        rows[index, : len(needed.rows)] = needed.rows
    write = list(committed[span.first : span.last + 1])
    write += [0] * (span.batch - len(write))  # a slot that no sequence has needs none of its rows
    return ids, rows, np.array(write)


def _masks(span: Span, shape: tuple[int, ...]) -> Words | None:
    """[B, R, ceil(V / 32)], ones where every token is legal; None if that is so in every row."""
    given = [(member.slot - span.first, masks) for member in span.members if (masks := member.needed.masks) is not None]
    if not given:
        return None
    all_masks = np.full((*shape, given[0][1].shape[-1]), ~np.uint32(0))
    for index, masks in given:
        all_masks[index, : len(masks)] = masks
    return all_masks


def _asked(span: Span, shape: tuple[int, ...]) -> Ints | None:
    """[B, R, M], padded with token 0; None if no row asks."""
    given = [(member.slot - span.first, asked) for member in span.members if (asked := member.needed.asked) is not None]
    if not given:
        return None
    all_asked = np.zeros((*shape, max(asked.shape[-1] for _, asked in given)), np.int64)
    for index, asked in given:
        all_asked[index, : len(asked), : asked.shape[-1]] = asked
    return all_asked


def span_of(members: list[Member]) -> Span:
    step = max(len(member.needed.tokens) for member in members)
    return Span(members[0].slot, members[-1].slot, step, members)
