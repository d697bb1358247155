"""Mode ``auto``: the block length of self-speculation, chosen each cycle by its yield and its cost.

A cycle with blocks of b tokens runs a draft pass and a commit pass over the whole batch; b = 1 is AR and runs the
commit pass alone. A sequence's cycle yields ``1 + sum over j < b of (r[1] * ... * r[j])`` tokens: the drafts that are
expected to be accepted before the text ends, and the causal row's token, with ``r[j] = rates[j] * (1 - end_rate)``
(:mod:`trimode.runtime.decoding.acceptance`). So each cycle uses

    b* = argmax over b of  (sum of yields over the batch) / (seconds of the draft pass + seconds of the commit pass)

with the seconds of :mod:`trimode.runtime.scheduling.pass_cost` at this batch. Sequences of fixed modes count as they
are: their tokens come whatever b is, and their passes are shared. One b serves all ``auto`` sequences of a batch: a
pass is as long as its longest member, so a shorter block beside a longer one would save nothing. On an idle machine few
sequences get long blocks, since a pass costs nearly the same for 1 token as for 16; a full batch is compute-bound,
every drafted token costs, and b shrinks toward AR.

A block length that would be better if its passes took their least possible time is tried for one cycle, shorter ones
first: their passes bound the cost of longer ones. Trials that turn out slower may take TRIAL_SHARE of the time. The
choice affects when tokens come, never which.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from operator import add
from typing import NamedTuple

from trimode.runtime.decoding.acceptance import LONGEST_BLOCK
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.scheduling.pass_cost import PassCost

CHOICES = tuple(1 << exponent for exponent in range(LONGEST_BLOCK.bit_length()))
TRIAL_SHARE = 0.05


class _Cycle(NamedTuple):
    """A cycle with one of the block lengths. commits, drafts: sequences in its passes. step: their tokens. tokens: the
    expected yield.
    """

    block: int
    commits: int
    drafts: int
    step: int
    tokens: float

    def seconds(self, cost: PassCost) -> float:
        drafting = cost.seconds("diffusion", self.drafts, self.step) if self.drafts else 0.0
        return drafting + cost.seconds("ar", self.commits, self.step)

    def least_seconds(self, cost: PassCost) -> float:
        drafting = cost.least_seconds("diffusion", self.drafts, self.step) if self.drafts else 0.0
        return drafting + cost.least_seconds("ar", self.commits, self.step)


class BlockChooser:
    """Chooses by ``cost``, which its owner updates with every pass."""

    def __init__(self, cost: PassCost) -> None:
        self._cost = cost
        self._owed = 0.0  # seconds that trials have lost and that are not made up for
        self._trial: tuple[_Cycle, float] | None = None  # the last choice, and the tokens a second of the best one

    def choose(self, deciding: Many[Sequence], others: Many[Sequence]) -> int:
        """The block length of this cycle.

        deciding: the ``auto`` sequences that begin a cycle. others: sequences of fixed modes that are past their
        prefill.
        """
        self._settle_trial()
        cycles = _cycles(deciding, others)
        best = max(cycles, key=lambda cycle: cycle.tokens / cycle.seconds(self._cost))
        seconds = best.seconds(self._cost)
        rate = best.tokens / seconds
        if self._owed <= 0:
            for cycle in cycles:
                if cycle is not best and cycle.tokens / cycle.least_seconds(self._cost) > rate:
                    self._trial = cycle, rate
                    return cycle.block
        self._owed = max(0.0, self._owed - TRIAL_SHARE * seconds)
        return best.block

    def _settle_trial(self) -> None:
        """Charge what the last trial took beyond the best choice; its passes have been observed by now."""
        if self._trial is not None:
            cycle, rate = self._trial
            self._owed += max(0.0, cycle.seconds(self._cost) - cycle.tokens / rate)
            self._trial = None


def _cycles(deciding: Many[Sequence], others: Many[Sequence]) -> list[_Cycle]:
    """One for each block length up to the longest that a sequence can take."""
    drafting = [sequence for sequence in others if sequence.params.mode == "linear_spec"]
    fixed = max((sequence.longest_block for sequence in drafting), default=1)
    longest = max(sequence.longest_block for sequence in deciding)
    blocks = [block for block in CHOICES if block < 2 * longest]
    tokens = [sum(_yields(sequence, [sequence.longest_block])[0] for sequence in others)] * len(blocks)
    for sequence in deciding:
        tokens = list(map(add, tokens, _yields(sequence, blocks)))
    return [
        _Cycle(
            block=block,
            commits=len(deciding) + len(others),
            drafts=len(drafting) + (len(deciding) if block > 1 else 0),
            step=max(min(block, longest), fixed),
            tokens=expected,
        )
        for block, expected in zip(blocks, tokens, strict=True)
    ]


def _yields(sequence: Sequence, blocks: Many[int]) -> list[float]:
    """Tokens of a cycle with each of these blocks, as far as the sequence can take them."""
    yields, longest = sequence.acceptance.yields(), min(sequence.longest_block, LONGEST_BLOCK)
    return [yields[min(block, longest) - 1] for block in blocks]
