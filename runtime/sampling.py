"""From candidates to a token: greedy, or a draw at a temperature.

A draw is the inverse of the candidates' distribution at one uniform number, and that number depends on the seed and the
token's position alone. So a sequence's draws depend neither on the batch nor on how many tokens a pass yields: sampled
self-speculation emits the very tokens that sampled AR emits with the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.executor import Ints


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """A number in [0, 1), independent for every (seed, position, draw)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, draw, position])).random())


def choose(logits: NDArray[np.float32], tokens: Ints, temperature: float, numbers: Sequence[float]) -> Ints:
    """A token a row, [R]. logits, tokens: [R, k], best first. numbers: [R] in [0, 1), used at temperature > 0 only.

    A draw is among the k candidates that the engine reports; their probabilities are renormalised.
    """
    if temperature == 0:
        return tokens[:, 0]
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose weight is 0
        weights = np.exp((logits.astype(np.float64) - logits[:, :1]) / temperature)
    cumulative = weights.cumsum(axis=-1)
    below = cumulative <= np.asarray(numbers)[:, None] * cumulative[:, -1:]
    chosen: Ints = np.take_along_axis(tokens, below.sum(axis=-1)[:, None], axis=-1)[:, 0]
    return chosen
