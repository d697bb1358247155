"""How far drafts are accepted: a moving average for each place of the block, and what a block is expected to yield.

Texts end, and what a block holds beyond the end is lost. A sequence cannot know its own end, so how often a token is a
text's last is learnt over all sequences.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul

LONGEST_BLOCK = 32  # of what auto chooses from; places past it are taken to be as good as its last

_OWN_WEIGHT = 0.1  # of a cycle in a sequence's own averages
_SHARED_WEIGHT = 0.02  # and in those that new sequences begin with
_FIRST_GUESS = 0.8
_FIRST_END_RATE = 0.01
_END_WEIGHT = 0.002
# A cycle without drafts teaches nothing, and what was known grows stale.
_OWN_FORGETTING = 0.05
_SHARED_FORGETTING = 0.002


class Acceptance:
    """``rates[j]``: probability that the draft at place j + 1 of a block is accepted when all before it were, in a text
    that goes on. end_rate: probability that a token is its text's last.

    begins_with: averages over all sequences, which learn from this one as well.
    """

    def __init__(self, begins_with: Acceptance | None = None) -> None:
        self._shared = begins_with
        # A list, not an array: a handful of its numbers change each cycle.
        self.rates: list[float] = (
            [_FIRST_GUESS] * (LONGEST_BLOCK - 1) if begins_with is None else begins_with.rates.copy()
        )
        self.end_rate: float = _FIRST_END_RATE if begins_with is None else begins_with.end_rate
        self._yields: list[float] | None = None

    def observe(self, accepted: int, tested: int, ended: bool) -> None:
        """A block in which the first ``accepted`` drafts were accepted; ``tested`` is one more if the next one was
        rejected, and no more if the text ended or the block did. ended: whether the text did, but for its length.
        """
        self._learn(accepted, tested, _OWN_WEIGHT)
        if self._shared is not None:
            self._shared._learn(accepted, tested, _SHARED_WEIGHT)
            # Settles where the ends foretold of so many tokens are as many as there are.
            forgotten = min(1.0, _END_WEIGHT * (accepted + 1))
            self._shared.end_rate += _END_WEIGHT * ended - forgotten * self._shared.end_rate
            self.end_rate = self._shared.end_rate

    def _learn(self, accepted: int, tested: int, weight: float) -> None:
        rates, tested = self.rates, min(tested, len(self.rates))
        for place in range(min(accepted, tested)):
            rates[place] += weight * (1 - rates[place])
        if tested > accepted:
            rates[accepted] -= weight * rates[accepted]
        self._yields = None

    def forget(self) -> None:
        """A cycle without drafts: drift back to what all sequences know, and that to the first guess."""
        if self._shared is not None:
            shared = self._shared.rates
            shared[:] = [rate + _SHARED_FORGETTING * (_FIRST_GUESS - rate) for rate in shared]
            own = zip(self.rates, shared, strict=True)
            self.rates = [rate + _OWN_FORGETTING * (of_all - rate) for rate, of_all in own]
        self._yields = None

    def yields(self) -> list[float]:
        """By block length, from 1 on: tokens that a cycle yields, the drafts accepted and one more."""
        if self._yields is None:
            goes_on = 1 - self.end_rate
            emitted = accumulate([rate * goes_on for rate in self.rates], mul)
            self._yields = list(accumulate(emitted, initial=1.0))
        return self._yields
