"""Acceptance rates: a moving average for each position of the block, and the expected tokens of a cycle.

Drafts after the end of an answer are lost. The rate at which answers end is estimated over all sequences.

A new sequence starts from the averages over all sequences. Until enough is seen, those are plain means, so that they
settle within a few answers. A position that few cycles reach is assumed to have the rate of the preceding one:
otherwise short blocks would keep ``auto`` from measuring what longer ones yield.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul

LONGEST_BLOCK = 32  # longest block that auto chooses; later positions are assumed to be accepted like its last

FIRST_GUESS = 0.8  # of the diffusion draft's rates
# Of trees of 1, 2, 4, ... nodes.
_FIRST_TREE_GAINS = [(1 << exponent) / 16 for exponent in range(LONGEST_BLOCK.bit_length())]
_OWN_WEIGHT = 0.1  # weight of a cycle in the sequence's own averages
_OWN_TREE_WEIGHT = 0.05  # of a cycle in the sequence's own tree gains
_LIKE_BEFORE = 4.0  # cycles that the rate of the preceding position counts as, and the first guess of a tree gain
_MOST_CYCLES = 100.0  # that count in the averages over all sequences; older ones are forgotten
_FIRST_END_RATE = 0.01
_FIRST_TOKENS, _MOST_TOKENS = 100.0, 2000.0  # that count in the end rate: before anything is seen, and at most
# A cycle without drafts observes nothing; old averages decay.
_OWN_FORGETTING = 0.05
_SHARED_FORGETTING = 0.0005
_TREE_FORGETTING = 0.0005


class SharedAcceptance:
    """Averages over all sequences, from which new ones start. first_guess: of the rates, before anything is known.

    end_rate: probability that a token is the last of its text.
    """

    def __init__(self, first_guess: float = FIRST_GUESS) -> None:
        self.end_rate = _FIRST_END_RATE
        self._first_guess = first_guess
        self._means = [0.0] * (LONGEST_BLOCK - 1)
        self._cycles = [0.0] * (LONGEST_BLOCK - 1)  # that each mean is of
        self._tokens = _FIRST_TOKENS
        self._tree_means = [0.0] * len(_FIRST_TREE_GAINS)
        self._tree_cycles = [0.0] * len(_FIRST_TREE_GAINS)

    @property
    def rates(self) -> list[float]:
        """As :attr:`Acceptance.rates`."""
        before, rates = self._first_guess, []
        for mean, cycles in zip(self._means, self._cycles, strict=True):
            before = (cycles * mean + _LIKE_BEFORE * before) / (cycles + _LIKE_BEFORE)
            rates.append(before)
        return rates

    @property
    def tree_gains(self) -> list[float]:
        """As :attr:`Acceptance.tree_gains`."""
        known = zip(self._tree_means, self._tree_cycles, _FIRST_TREE_GAINS, strict=True)
        return [(cycles * mean + _LIKE_BEFORE * first) / (cycles + _LIKE_BEFORE) for mean, cycles, first in known]

    def observe_tree(self, at: int, gained: float) -> None:
        """Count a cycle in which a tree was verified, by the exponent of its width."""
        self._tree_cycles[at] = min(self._tree_cycles[at] + 1, _MOST_CYCLES)
        self._tree_means[at] += (gained - self._tree_means[at]) / self._tree_cycles[at]

    def forget_trees(self, cycles: int = 1) -> None:
        """Decay for so many cycles with a draft."""
        kept = (1 - _TREE_FORGETTING) ** cycles
        self._tree_cycles = [kept * known for known in self._tree_cycles]

    def observe(self, accepted: int, tested: int, ended: bool) -> None:
        """Count one commit, as :meth:`Acceptance.observe`."""
        means, cycles = self._means, self._cycles
        for place in range(min(tested, len(means))):
            cycles[place] = min(cycles[place] + 1, _MOST_CYCLES)
            means[place] += ((place < accepted) - means[place]) / cycles[place]
        # Fixed point: the predicted number of text ends equals the observed number.
        self._tokens = min(self._tokens + accepted + 1, _MOST_TOKENS)
        forgotten = min(1.0, (accepted + 1) / self._tokens)
        self.end_rate += ended / self._tokens - forgotten * self.end_rate

    def forget(self, cycles: int = 1) -> None:
        """Decay for so many cycles without drafts."""
        kept = (1 - _SHARED_FORGETTING) ** cycles
        self._cycles = [kept * known for known in self._cycles]


class Acceptance:
    """Running estimate of one sequence's acceptance.

    rates[j]: probability that the draft at place j + 1 of a block is accepted, given that all before it were and that
    the text continues. end_rate: probability that a token is the last of its text. tree_gains: of widths 1, 2, 4, ...,
    the tokens that a cycle emits if so many nodes of a draft are verified as a tree, beyond those that it emits if a
    block of as many tokens is. begins_with: averages over all sequences; this sequence starts from what they are when
    it drafts first, and updates them.
    """

    def __init__(self, begins_with: SharedAcceptance | None = None) -> None:
        self._shared = begins_with
        self._start = SharedAcceptance() if begins_with is None else begins_with
        self.end_rate: float = self._start.end_rate
        self._rates: list[float] | None = None
        self._tree_gains: list[float] | None = None

    # Lists are faster than arrays here: few of their numbers change each cycle.
    @property
    def rates(self) -> list[float]:
        if self._rates is None:
            self._rates = self._start.rates
        return self._rates

    @property
    def tree_gains(self) -> list[float]:
        if self._tree_gains is None:
            self._tree_gains = self._start.tree_gains
        return self._tree_gains

    def observe(self, accepted: int, tested: int, ended: bool) -> None:
        """Count one commit. accepted: drafts accepted. tested: one more if the next draft was rejected; the same if the
        text or the block ended. ended: whether the text ended, other than by its length limit.
        """
        rates = self.rates
        for place in range(min(accepted, tested, len(rates))):
            rates[place] += _OWN_WEIGHT * (1 - rates[place])
        if accepted < min(tested, len(rates)):
            rates[accepted] -= _OWN_WEIGHT * rates[accepted]
        if self._shared is not None:
            self._shared.observe(accepted, tested, ended)
            self.end_rate = self._shared.end_rate

    def tree_gain(self, width: int) -> float:
        """The tree gain of the largest width that is at most ``width``."""
        return self.tree_gains[_place_of_width(width)]

    def observe_tree(self, width: int, gained: float) -> None:
        """Count a cycle in which a tree was verified. gained: as ``tree_gains``. Other widths decay."""
        self.forget_trees()
        at = _place_of_width(width)
        self.tree_gains[at] += _OWN_TREE_WEIGHT * (gained - self.tree_gains[at])
        if self._shared is not None:
            self._shared.observe_tree(at, gained)

    def forget_trees(self, cycles: int = 1) -> None:
        """Decay for so many cycles with a draft, towards the first guess."""
        forgotten = 1 - (1 - _TREE_FORGETTING) ** cycles
        known = zip(self.tree_gains, _FIRST_TREE_GAINS, strict=True)
        self._tree_gains = [gain + forgotten * (first - gain) for gain, first in known]
        if self._shared is not None:
            self._shared.forget_trees(cycles)

    def forget(self, cycles: int = 1) -> None:
        """Decay for so many cycles without drafts, towards the averages over all sequences, and those to the first
        guess.
        """
        if self._shared is not None:
            self._shared.forget(cycles)
            forgotten = 1 - (1 - _OWN_FORGETTING) ** cycles
            own = zip(self.rates, self._shared.rates, strict=True)
            self._rates = [rate + forgotten * (of_all - rate) for rate, of_all in own]

    def yields(self, longest: int = LONGEST_BLOCK) -> list[float]:
        """Expected tokens of a cycle, by block length from 1 to ``longest``: the accepted drafts and one more."""
        goes_on = 1 - self.end_rate
        emitted = accumulate([rate * goes_on for rate in self.rates[: longest - 1]], mul)
        return list(accumulate(emitted, initial=1.0))


def _place_of_width(width: int) -> int:
    """Of a tree of ``width`` nodes in the lists of tree gains."""
    return min(width.bit_length(), len(_FIRST_TREE_GAINS)) - 1
