"""How the next cycle drafts: the block length of mode ``auto``, and which sequences copy their drafts.

A cycle with blocks of b tokens runs a draft pass and a commit pass over the whole batch; b = 1 is AR and runs the
commit pass alone. A sequence's cycle yields ``1 + sum over j < b of (r[1] * ... * r[j])`` tokens: the drafts that are
expected to be accepted before the text ends, and the causal row's token, with ``r[j] = rates[j] * (1 - end_rate)``
(:mod:`trimode.runtime.decoding.acceptance_rates`). So each cycle uses

    b* = argmax over b of  (sum of yields over the batch) / (seconds of the draft pass, the commit pass and the host)

with the passes' seconds of :mod:`trimode.runtime.scheduling.pass_cost` at this batch. Sequences of fixed modes count
as they are: their tokens come whatever b is, and their passes are shared. One b serves all ``auto`` sequences of a
batch: a pass is as long as its longest member, so a shorter block beside a longer one would save nothing. On an idle
machine few sequences get long blocks, since a pass costs nearly the same for 1 token as for 16; a full batch is
compute-bound, every drafted token costs, and b shrinks toward AR.

A sequence whose text has occurred before may copy its drafts (:mod:`trimode.runtime.decoding.lookup`) and skip the
draft pass. For each b there are three ways, each a candidate of the same argmax: those sequences copy whose copies
yield at least as much as their drafts; all copy that can; or no ``auto`` sequence drafts at all, so that those without
a copy decode one token beside copies of b.

A block length that would be better if its passes took their least possible time is tried for one cycle. Trials that
turn out slower may take a small share of the time, and a larger one while pass times change.

Choosing takes long beside short passes, so a choice is kept for some cycles, unless the number of sequences changes
much or one may copy. It is kept for twice as many cycles each time it is confirmed, until choosing takes a small share
of the time; for a new choice, it may take four times that. The choice affects when tokens come, never which.

With one sequence, or with a weak drafter, the likeliest nodes of a draft may yield more tokens than its block does, at
the same cost of the passes (:mod:`trimode.runtime.decoding.draft_tree`). Each sequence learns how many more. They are
verified as a tree where that is worth the time in which the host builds the trees. So each b has two yields:

    tokens / seconds   and   (tokens + gained) / (seconds + seconds of the trees)
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from typing import NamedTuple

from trimode.runtime.decoding.acceptance_rates import LONGEST_BLOCK
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.scheduling.pass_cost import SURPRISE, PassCost

CHOICES = tuple(1 << exponent for exponent in range(LONGEST_BLOCK.bit_length()))
MOST_TRIAL_SHARE, FIRST_TRIAL_SHARE, LEAST_TRIAL_SHARE = 0.05, 0.01, 0.002  # of the time
MUCH_FASTER = 0.1  # share of its time that a trial saves, after which others may be much faster, too
VAIN_TRIAL = 0.75  # factor of the share after any other trial
LEAST_KEPT, MOST_KEPT = 4, 64  # cycles of a choice without copies
MOST_CHANGE = 0.3  # of the number of sequences while a choice is kept
# Of the host, for a cycle of one token and for each of its sequences, on one core of a server CPU between passes on the
# same core. Cycles of more tokens take twice as long.
HOST_SECONDS, HOST_SECONDS_OF_A_SEQUENCE = 4e-5, 2e-5
# That the host needs for one tree and for each of its nodes, on the same core.
TREE_SECONDS, TREE_SECONDS_OF_A_NODE = 1.8e-5, 3e-6
# That the host needs to choose, and the share of the time that this may take.
CHOOSING_SECONDS, CHOOSING_SECONDS_OF_A_SEQUENCE = 8e-5, 1e-5
CHOOSING_SHARE = 0.005


def seconds_of_a_tree(nodes: int) -> float:
    """That the host needs to build and verify it."""
    return TREE_SECONDS + TREE_SECONDS_OF_A_NODE * nodes


class Opening(NamedTuple):
    """A sequence that begins a cycle. copy_yields: expected tokens of a cycle that verifies its copy, by block length
    from 1 on; empty if there is none.
    """

    sequence: Sequence
    copy_yields: list[float]

    @property
    def decides(self) -> bool:
        return self.sequence.params.mode == "auto"


class Plan(NamedTuple):
    """How a cycle drafts. block: length of the drafted blocks of ``auto``. copy_block: of the blocks that are copies.
    copying: for each opening sequence, whether its drafts are copies. tree: whether the drafts of ``auto`` are verified
    as trees of as many nodes as their blocks have tokens. trial: whether it is chosen to measure its passes. cycles:
    for how many it is chosen.
    """

    block: int
    copy_block: int
    copying: list[bool]
    tree: bool = False
    trial: bool = False
    cycles: int = 1


class Expectation(NamedTuple):
    """Of a cycle of the whole batch: the tokens that it generates, and the seconds of its passes and trees."""

    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class _Cycle(NamedTuple):
    """A cycle by one of the plans. commits, drafts: sequences in its passes. step: their tokens. tokens: the expected
    yield. trees: sequences whose drafts may be trees. gained: tokens that they yield beyond ``tokens`` if they are.
    """

    plan: Plan
    commits: int
    drafts: int
    step: int
    tokens: float
    trees: int
    gained: float

    def rate(self, seconds: float) -> float:
        """Tokens a second, if the passes take so many seconds, with trees where that is faster."""
        return max(self.tokens / seconds, (self.tokens + self.gained) / (seconds + self.tree_seconds))

    def expectation(self, seconds: float) -> Expectation:
        """With trees where that is faster."""
        if self.chosen(seconds).tree:
            return Expectation(self.tokens + self.gained, seconds + self.tree_seconds)
        return Expectation(self.tokens, seconds)

    def chosen(self, seconds: float) -> Plan:
        """The plan, with trees where that is faster."""
        return self.plan._replace(tree=self.rate(seconds) > self.tokens / seconds)

    @property
    def tree_seconds(self) -> float:
        """What the host needs for the trees, if the drafts are trees."""
        return self.trees * seconds_of_a_tree(self.step)

    @property
    def host_seconds(self) -> float:
        """Without trees."""
        seconds = HOST_SECONDS + HOST_SECONDS_OF_A_SEQUENCE * self.commits
        return 2 * seconds if self.step > 1 else seconds

    def seconds(self, cost: PassCost) -> float:
        drafting = cost.seconds("diffusion", self.drafts, self.step) if self.drafts else 0.0
        return self.host_seconds + drafting + cost.seconds("ar", self.commits, self.step)

    def least_seconds(self, cost: PassCost) -> float:
        drafting = cost.least_seconds("diffusion", self.drafts, self.step) if self.drafts else 0.0
        return self.host_seconds + drafting + cost.least_seconds("ar", self.commits, self.step)


class _Trials:
    """Which block lengths are tried, and when.

    What a trial takes beyond the best choice is owed, and the next one waits until a share of the time since then has
    made up for it. The share is large after a trial that is much faster or that takes a very different time than
    expected, and after a pass that puts the cost of all others in doubt. It falls with each other trial.
    """

    def __init__(self, cost: PassCost) -> None:
        self._cost = cost
        self._share = FIRST_TRIAL_SHARE
        self._owed = 0.0  # seconds
        self._surprises = 0  # of the cost, so far
        self._block = 0  # block length of the last one
        # The last one if it is not settled, its expected seconds, and the tokens a second of the best choice.
        self._open: tuple[_Cycle, float, float] | None = None

    def next(self, cycles: Many[_Cycle], best: _Cycle, rate: float) -> _Cycle | None:
        """The cycle to try now, if any. rate: tokens a second of the best one. Blocks take turns, shorter ones first,
        since their passes bound the cost of longer ones.
        """
        if self._owed > 0:
            return None
        most = [cycle.rate(cycle.least_seconds(self._cost)) for cycle in cycles]
        promising = [cycle for cycle, each in zip(cycles, most, strict=True) if each > rate and cycle is not best]
        if not promising:
            return None
        tried = next((cycle for cycle in promising if cycle.plan.copy_block > self._block), promising[0])
        self._open, self._block = (tried, tried.seconds(self._cost), rate), tried.plan.copy_block
        return tried

    def settle(self) -> None:
        """Charge the last trial, whose passes have been observed by now."""
        if self._open is not None:
            cycle, expected, rate = self._open
            seconds = cycle.seconds(self._cost)
            lost = seconds - cycle.tokens / rate
            self._owed += max(0.0, lost)
            if lost < -MUCH_FASTER * seconds or abs(math.log(seconds / expected)) > SURPRISE:
                self._share = MOST_TRIAL_SHARE
            else:
                self._share = max(LEAST_TRIAL_SHARE, VAIN_TRIAL * self._share)
            self._open = None
        if self._surprises != self._cost.surprises:
            self._surprises, self._share = self._cost.surprises, MOST_TRIAL_SHARE

    def make_up(self, seconds: float) -> None:
        """The best choice is used for so many seconds."""
        self._owed = max(0.0, self._owed - self._share * seconds)


class BlockChooser:
    """Chooses by ``cost``, which its owner updates with every pass. trees: whether it may choose them."""

    def __init__(self, cost: PassCost, trees: bool = True) -> None:
        self._cost = cost
        self._trees = trees
        self._trials = _Trials(cost)
        self._compared: tuple[list[_Cycle], list[float]] = [], []  # by the last choice: cycles, and their seconds
        self._kept = Plan(0, 0, [])  # the last choice without copies
        self._kept_for = 0  # sequences
        self._left = 0  # cycles for which it still holds

    def kept(self, sequences: int) -> Plan | None:
        """The plan of this cycle where the last choice still holds; None elsewhere. sequences: how many run; none of
        them may copy.
        """
        if self._left and abs(sequences - self._kept_for) <= MOST_CHANGE * self._kept_for:
            self._left -= 1
            return self._kept
        return None

    def choose(self, opening: Many[Opening], others: Many[Sequence], prefilling: bool = False) -> Plan:
        """A new plan, for this cycle and those for which :meth:`kept` returns it.

        opening: the sequences whose drafts are to be chosen: those of ``auto``, and those that may copy. others: the
        other sequences. Those that are in their prefill count as if they were past it: they will join within a few
        steps, and a block that is best for few sequences beside long prefills delays all. prefilling: whether there are
        such sequences, beside which a trial would measure something else.
        """
        self._left = 0
        self._trials.settle()
        cycles = _cycles(opening, others, self._trees)
        found = [cycle.seconds(self._cost) for cycle in cycles]
        self._compared = cycles, found
        rates = [cycle.rate(seconds) for cycle, seconds in zip(cycles, found, strict=True)]
        rate = max(rates)
        best, seconds = cycles[rates.index(rate)], found[rates.index(rate)]
        tried = None if prefilling else self._trials.next(cycles, best, rate)
        if tried is not None:
            return tried.plan._replace(trial=True)
        plan = best.chosen(seconds)
        if not any(copy_yields for _, copy_yields in opening):
            confirmed = (plan.block, plan.tree) == (self._kept.block, self._kept.tree)
            choosing = CHOOSING_SECONDS + CHOOSING_SECONDS_OF_A_SEQUENCE * len(opening)
            longest = min(math.ceil(choosing / (CHOOSING_SHARE * seconds)), MOST_KEPT)
            cycles_kept = min(2 * self._kept.cycles, longest) if confirmed else longest // 4
            plan = plan._replace(cycles=max(cycles_kept, LEAST_KEPT))
            self._kept, self._kept_for, self._left = plan, len(opening) + len(others), plan.cycles - 1
        self._trials.make_up(seconds * plan.cycles)
        return plan

    def expectations(self) -> dict[int, Expectation]:
        """What the last choice compared: for each block length, the plan with the most tokens per second. Callable from
        any thread.
        """
        by_block: dict[int, Expectation] = {}
        for cycle, seconds in zip(*self._compared, strict=True):
            found, block = cycle.expectation(seconds), cycle.plan.copy_block
            if block not in by_block or found.rate > by_block[block].rate:
                by_block[block] = found
        return by_block


def _cycles(opening: Many[Opening], others: Many[Sequence], may_be_trees: bool) -> list[_Cycle]:
    """One for each plan, the shorter blocks first, up to the longest that a sequence can take."""
    deciding = [each.decides for each in opening]
    lengths = [sequence.longest_block for sequence, _ in opening]
    longest = max(lengths)
    blocks = [block for block in CHOICES if block < 2 * longest]
    fixed = [sequence.longest_block for sequence in others if sequence.params.mode == "linear_spec"]
    fixed += [length for length, decides in zip(lengths, deciding, strict=True) if not decides]
    fixed_step = max(fixed, default=1)
    beside = sum(
        _yields(sequence.acceptance.yields(), sequence.longest_block, [LONGEST_BLOCK])[0] for sequence in others
    )
    drafted = [
        _yields(sequence.acceptance.yields(), length, blocks if decides else [LONGEST_BLOCK] * len(blocks))
        for (sequence, _), length, decides in zip(opening, lengths, deciding, strict=True)
    ]
    copied = [
        _yields(copy_yields, length, blocks) if copy_yields else []
        for (_, copy_yields), length in zip(opening, lengths, strict=True)
    ]

    def cycle(column: int, copying: list[bool], auto_drafts: bool) -> _Cycle:
        block = blocks[column]
        tokens, drafts, trees, gained = beside, len(fixed), 0, 0.0
        for index, copies in enumerate(copying):
            if copies:
                tokens += copied[index][column]
                drafts -= not deciding[index]
            elif deciding[index] and not auto_drafts:
                tokens += 1.0
            else:
                tokens += drafted[index][column]
                if deciding[index]:
                    drafts += 1
                    if may_be_trees and lengths[index] > 1:
                        trees, gained = trees + 1, gained + opening[index].sequence.acceptance.tree_gains[column]
        step = max(min(block, longest), fixed_step if drafts else 1)
        plan = Plan(block if auto_drafts else 1, block, copying)
        return _Cycle(plan, len(opening) + len(others), drafts, step, tokens, trees, gained)

    able = [bool(yields) for yields in copied]
    if not any(able):
        return [cycle(column, able, auto_drafts=column > 0) for column in range(len(blocks))]
    cycles = [cycle(0, [False] * len(opening), auto_drafts=False)]
    for column in range(1, len(blocks)):
        better = [can and copied[at][column] >= drafted[at][column] for at, can in enumerate(able)]
        cycles.append(cycle(column, better, auto_drafts=True))
        if able != better:
            cycles.append(cycle(column, able, auto_drafts=True))
        if not all(able):
            cycles.append(cycle(column, able, auto_drafts=False))
    return cycles


def _yields(yields: list[float], longest: int, blocks: Many[int]) -> list[float]:
    """Tokens of a cycle with each of these blocks, as far as the sequence can take them."""
    longest = min(longest, len(yields))
    return [yields[min(block, longest) - 1] for block in blocks]
