"""Mode ``auto``: the block length of self-speculation, chosen each cycle by what it yields and what it costs.

A cycle with blocks of b tokens takes a draft pass and a commit pass over the whole batch; b = 1 is AR and takes the
commit pass alone. A sequence's cycle yields ``1 + sum over j < b of (r[1] * ... * r[j])`` tokens: the drafts that its
own history says will be accepted before its text ends, and the causal row's token, with
``r[j] = rates[j] * (1 - end_rate)`` (:mod:`trimode.runtime.decoding.acceptance`). So each cycle takes

    b* = argmax over b of  (sum of yields over the batch) / (seconds of the draft pass + seconds of the commit pass)

with the seconds of :mod:`trimode.runtime.scheduling.pass_cost` at this batch. Sequences of fixed modes count as they
are: their tokens come whatever b is, and their passes are shared. One b serves all ``auto`` sequences of a batch: a
pass is as long as its longest member, so a shorter block beside a longer one would save nothing. Few sequences on an
idle machine get long blocks, since a pass costs nearly the same for 1 token as for 16; a full batch is compute-bound,
every drafted token costs, and b shrinks toward AR. Greedy or sampled, b changes when tokens come, never which.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from operator import add

from trimode.runtime.decoding.acceptance import LONGEST_BLOCK
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.scheduling.pass_cost import PassCost

CHOICES = tuple(1 << exponent for exponent in range(LONGEST_BLOCK.bit_length()))


def choose_block_length(deciding: Many[Sequence], others: Many[Sequence], cost: PassCost) -> int:
    """deciding: the ``auto`` sequences that begin a cycle. others: sequences of fixed modes that are past their
    prefill.
    """
    drafting = [sequence for sequence in others if sequence.params.mode == "linear_spec"]
    fixed = max((sequence.longest_block for sequence in drafting), default=1)
    longest = max(sequence.longest_block for sequence in deciding)
    choices = [block for block in CHOICES if block < 2 * longest]
    tokens = [sum(_yields(sequence, [sequence.longest_block])[0] for sequence in others)] * len(choices)
    for sequence in deciding:
        tokens = list(map(add, tokens, _yields(sequence, choices)))

    def tokens_a_second(choice: int) -> float:
        block = choices[choice]
        drafts = len(drafting) + (len(deciding) if block > 1 else 0)
        step = max(min(block, longest), fixed)
        seconds = cost.least_seconds("ar", len(deciding) + len(others), step)
        if drafts:
            seconds += cost.least_seconds("diffusion", drafts, step)
        return tokens[choice] / seconds

    return choices[max(range(len(choices)), key=tokens_a_second)]


def _yields(sequence: Sequence, blocks: Many[int]) -> list[float]:
    """Tokens that a cycle yields, for each of these blocks, as far as the sequence can take them."""
    yields, longest = sequence.acceptance.yields(), min(sequence.longest_block, LONGEST_BLOCK)
    return [yields[min(block, longest) - 1] for block in blocks]
