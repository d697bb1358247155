"""Acceptance rates: a moving average for each place of the block, and the expected tokens of a cycle.

Drafts behind the end of a text are lost. The rate at which texts end is estimated over all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

LONGEST_BLOCK = 32  # longest block that auto chooses; later places are assumed as good as its last

_OWN_WEIGHT = 0.1  # weight of a cycle in the sequence's own averages
_SHARED_WEIGHT = 0.02  # weight of a cycle in the averages that new sequences start from
FIRST_GUESS = 0.8  # of the diffusion draft's rates
_FIRST_END_RATE = 0.01
_END_WEIGHT = 0.002
_LEAST_WEIGHT = 1e-3  # of a draft that was not verified
# A cycle without drafts observes nothing; old averages decay.
_OWN_FORGETTING = 0.05
_SHARED_FORGETTING = 0.0005


class Acceptance:
    """Running estimate of one sequence's acceptance.

    rates[j]: probability that the draft at place j + 1 of a block is accepted, given that all before it were and that
    the text continues. end_rate: probability that a token is the last of its text. begins_with: averages over all
    sequences; this sequence starts from them, and updates them. first_guess: of the rates, before anything is known.
    """

    def __init__(self, begins_with: Acceptance | None = None, first_guess: float = FIRST_GUESS) -> None:
        self._shared = begins_with
        self._first_guess = first_guess
        # A list is faster than an array here: few of its numbers change each cycle.
        self.rates: list[float] = (
            [first_guess] * (LONGEST_BLOCK - 1) if begins_with is None else begins_with.rates.copy()
        )
        self.end_rate: float = _FIRST_END_RATE if begins_with is None else begins_with.end_rate
        self._yields: list[float] | None = None

    def observe(self, accepted: int, tested: int, ended: bool, unverified: Sequence[float] = ()) -> None:
        """Count one commit. accepted: drafts accepted. tested: one more if the next draft was rejected; the same if the
        text or the block ended. ended: whether the text ended, other than by its length limit. unverified: expected
        acceptance of the drafts behind those that were verified and accepted. They count as far as they would have been
        reached: a tail is left out because it is poor, so without it the rates would be too high.
        """
        self._learn(accepted, tested, _OWN_WEIGHT, unverified)
        if self._shared is not None:
            self._shared._learn(accepted, tested, _SHARED_WEIGHT, unverified)
            # Fixed point: the predicted number of text ends equals the observed number.
            forgotten = min(1.0, _END_WEIGHT * (accepted + 1))
            self._shared.end_rate += _END_WEIGHT * ended - forgotten * self._shared.end_rate
            self.end_rate = self._shared.end_rate

    def _learn(self, accepted: int, tested: int, weight: float, unverified: Sequence[float]) -> None:
        rates, tested = self.rates, min(tested, len(self.rates))
        for place in range(min(accepted, tested)):
            rates[place] += weight * (1 - rates[place])
        if tested > accepted:
            rates[accepted] -= weight * rates[accepted]
        for place, expected in zip(range(tested, len(rates)), unverified, strict=False):
            rates[place] += weight * (expected - rates[place])
            weight *= expected
            if weight < _LEAST_WEIGHT:
                break
        self._yields = None

    def forget(self) -> None:
        """Decay after a cycle without drafts: own averages towards the shared ones, those towards the first guess."""
        if self._shared is not None:
            shared = self._shared.rates
            shared[:] = [rate + _SHARED_FORGETTING * (self._first_guess - rate) for rate in shared]
            own = zip(self.rates, shared, strict=True)
            self.rates = [rate + _OWN_FORGETTING * (of_all - rate) for rate, of_all in own]
        self._yields = None

    def yields(self) -> list[float]:
        """Expected tokens of a cycle, by block length from 1 on: the accepted drafts and one more."""
        if self._yields is None:
            goes_on = 1 - self.end_rate
            emitted = accumulate([rate * goes_on for rate in self.rates], mul)
            self._yields = list(accumulate(emitted, initial=1.0))
        return self._yields
