"""Mode ``auto``: the block length of self-speculation, chosen each cycle by what it yields and what it costs.

A cycle with blocks of b tokens takes a draft pass and a commit pass over the whole batch; b = 1 is AR and takes the
commit pass alone. A sequence's cycle yields ``1 + sum over j < b of (rates[1] * ... * rates[j])`` tokens: the drafts
that its own history says will be accepted, and the causal row's token (:mod:`trimode.runtime.acceptance`). So each
cycle takes

    b* = argmax over b of  (sum of yields over the batch) / (seconds of the draft pass + seconds of the commit pass)

with the seconds of :mod:`trimode.runtime.pass_cost` at this batch. Sequences of fixed modes count as they are: their
tokens come whatever b is, and their passes are shared. One b serves all ``auto`` sequences of a batch: a pass is as
long as its longest member, so a shorter block beside a longer one would save nothing. Few sequences on an idle machine
get long blocks, since a pass costs nearly the same for 1 token as for 16; a full batch is compute-bound, every drafted
token costs, and b shrinks toward AR. Greedy or sampled, b changes when tokens come, never which.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from trimode.runtime.acceptance import LONGEST_BLOCK
from trimode.runtime.decoding import Sequence
from trimode.runtime.pass_cost import PassCost

CHOICES = tuple(1 << exponent for exponent in range(LONGEST_BLOCK.bit_length()))


def choose_block_length(deciding: Many[Sequence], others: Many[Sequence], cost: PassCost) -> int:
    """deciding: the ``auto`` sequences that begin a cycle. others: sequences of fixed modes that are past their
    prefill.
    """
    drafting = [sequence for sequence in others if sequence.params.mode == "linear_spec"]
    fixed = max((sequence.longest_block for sequence in drafting), default=1)
    tokens_of_others = sum(sequence.acceptance.expected(sequence.longest_block) for sequence in others)
    longest = max(sequence.longest_block for sequence in deciding)

    def tokens_a_second(block: int) -> float:
        yields = [sequence.acceptance.expected(min(block, sequence.longest_block)) for sequence in deciding]
        drafts = len(drafting) + (len(deciding) if block > 1 else 0)
        step = max(min(block, longest), fixed)
        seconds = cost.seconds("ar", len(deciding) + len(others), step)
        if drafts:
            seconds += cost.seconds("diffusion", drafts, step)
        return (sum(yields) + tokens_of_others) / seconds

    return max((block for block in CHOICES if block < 2 * longest), key=tokens_a_second)
