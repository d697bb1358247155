"""How often a drafted token is accepted, by the probability that the draft gave it.

A draft is a guess about another engine's choice, so its probabilities are not acceptance rates: they are calibrated by
what happened to earlier drafts of like probability, of this request first and of all requests where it has few.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BOUNDS = np.array([0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99, 0.997])  # of the bins
_OWN_WEIGHT = 0.05  # of a draft in the request's own rates
_SHARED_WEIGHT = 0.01  # of a draft in the rates that new requests start from


class Confidence:
    """Acceptance rates of one request. begins_with: those of all requests; this one starts from them, and updates them.

    Before anything is known, a bin's rate is its middle.
    """

    def __init__(self, begins_with: Confidence | None = None) -> None:
        self._shared = begins_with
        edges = np.concatenate([[0.0], _BOUNDS, [1.0]])
        self._rates: list[float] = (
            ((edges[1:] + edges[:-1]) / 2).tolist() if begins_with is None else begins_with._rates.copy()
        )

    def rates(self, probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
        """Expected acceptance of drafts with these probabilities [M, k], best first in each row.

        A less probable draft of a place is never expected to be accepted more often than a more probable one.
        """
        found: NDArray[np.float64] = np.array(self._rates)[np.searchsorted(_BOUNDS, probabilities)]
        return np.minimum.accumulate(found, axis=1) if found.shape[1] > 1 else found

    def observe(self, probabilities: Sequence[float], accepted: Sequence[bool]) -> None:
        """Count drafts that were compared with the token that came."""
        bins = np.searchsorted(_BOUNDS, probabilities).tolist()
        for at, holds in zip(bins, accepted, strict=True):
            self._rates[at] += _OWN_WEIGHT * (holds - self._rates[at])
            if self._shared is not None:
                self._shared._rates[at] += _SHARED_WEIGHT * (holds - self._shared._rates[at])
