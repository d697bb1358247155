"""How far drafts are accepted: a moving average for each place of the block, and what a block is expected to yield."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LONGEST_BLOCK = 32  # of what auto chooses from; places past it are taken to be as good as its last

_OWN_WEIGHT = 0.25  # of a cycle in a sequence's own averages
_SHARED_WEIGHT = 0.02  # and in those that new sequences begin with
_FIRST_GUESS = 0.8
# A cycle without drafts teaches nothing, and what was known grows stale.
_OWN_FORGETTING = 0.05
_SHARED_FORGETTING = 0.002


class Acceptance:
    """``rates[j]``: probability that the draft at place j + 1 of a block is accepted when all before it were.

    begins_with: averages over all sequences, which learn from this one as well.
    """

    def __init__(self, begins_with: Acceptance | None = None) -> None:
        self._shared = begins_with
        self.rates: NDArray[np.float64] = (
            np.full(LONGEST_BLOCK - 1, _FIRST_GUESS) if begins_with is None else begins_with.rates.copy()
        )
        self._yields: NDArray[np.float64] | None = None

    def observe(self, accepted: int, tested: int) -> None:
        """A block in which the first ``accepted`` drafts were accepted; ``tested`` is one more if the next one was
        rejected, and no more if the text ended or the block did.
        """
        self._learn(accepted, tested, _OWN_WEIGHT)
        if self._shared is not None:
            self._shared._learn(accepted, tested, _SHARED_WEIGHT)

    def _learn(self, accepted: int, tested: int, weight: float) -> None:
        accepted, tested = min(accepted, len(self.rates)), min(tested, len(self.rates))
        self.rates[:accepted] += weight * (1 - self.rates[:accepted])
        if tested > accepted:
            self.rates[accepted] -= weight * self.rates[accepted]
        self._yields = None

    def forget(self) -> None:
        """A cycle without drafts: drift back to what all sequences know, and that to the first guess."""
        if self._shared is not None:
            self._shared.rates += _SHARED_FORGETTING * (_FIRST_GUESS - self._shared.rates)
            self.rates += _OWN_FORGETTING * (self._shared.rates - self.rates)
        self._yields = None

    def expected(self, block_length: int) -> float:
        """Tokens that a cycle with this block yields: the drafts accepted, and one more."""
        if self._yields is None:
            self._yields = 1 + np.concatenate(([0.0], self.rates.cumprod().cumsum()))
        return float(self._yields[min(block_length, LONGEST_BLOCK) - 1])
