"""From a row's candidates to a token: greedy, or a draw from the row's distribution under a request's parameters.

A draw is the inverse of the candidates' distribution at one uniform number, and that number depends on the seed and the
token's position alone. So a sequence's draws depend neither on the batch nor on how many tokens a pass yields: sampled
self-speculation emits the very tokens that sampled AR emits with the same seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.executor import Ints
from trimode.runtime.request.sampling_params import SamplingParams

Reals = NDArray[np.float32]


class UniformNumbers:
    """Numbers in [0, 1), independent for every (seed, position, draw)."""

    _CHUNK = 64  # positions of one generator: making a generator costs more than its numbers

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._chunks: dict[tuple[int, int], NDArray[np.float64]] = {}

    def at(self, positions: Sequence[int], draw: int = 0) -> NDArray[np.float64]:
        """[R] for R positions of one pass; draw tells the passes over one position apart."""
        return np.array([self._chunk(position // self._CHUNK, draw)[position % self._CHUNK] for position in positions])

    def _chunk(self, number: int, draw: int) -> NDArray[np.float64]:
        if (number, draw) not in self._chunks:
            # Sequences go forward: of what is behind, nothing is asked again.
            self._chunks = {key: chunk for key, chunk in self._chunks.items() if key[0] >= number - 1}
            generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, draw, number]))
            self._chunks[number, draw] = generator.random(self._CHUNK)
        return self._chunks[number, draw]


class Sampler:
    """One sequence's choice of tokens; it is told each emitted token, for the penalties.

    prompt: counts for the repetition penalty, as emitted tokens do; presence and frequency count emitted ones only.
    """

    def __init__(self, params: SamplingParams, prompt: Ints, seed: int) -> None:
        self._params = params
        self._numbers = UniformNumbers(seed)
        self._penalised = params.penalised
        self._in_prompt = frozenset(prompt.tolist()) if self._penalised else frozenset[int]()
        self._emitted: Counter[int] = Counter()

    def note(self, token: int) -> None:
        """``token`` was emitted."""
        if self._penalised:
            self._emitted[token] += 1

    def rows(self, logits: Reals, tokens: Ints, positions: Sequence[int], draw: int = 0) -> Ints:
        """A token a row, [R], of rows that do not depend on one another. logits, tokens: [R, k], best first."""
        if self._params.greedy:
            return tokens[:, 0]
        weights = kept_weights(logits, self._params)
        cumulative = weights.cumsum(axis=-1)
        below = cumulative <= self._numbers.at(positions, draw)[:, None] * cumulative[:, -1:]
        chosen: Ints = np.take_along_axis(tokens, below.sum(axis=-1)[:, None], axis=-1)[:, 0]
        return chosen

    def run(self, logits: Reals, tokens: Ints, positions: Sequence[int]) -> Iterator[int]:
        """A token for each row of a causal run, one at a time: with penalties, a row's choice depends on the tokens
        noted since the row before.
        """
        if not self._penalised:
            yield from self.rows(logits, tokens, positions).tolist()
            return
        for row, position in enumerate(positions):
            penalised = self._after_penalties(logits[row], tokens[row])
            order = np.argsort(-penalised, kind="stable")
            yield int(self.rows(penalised[order][None], tokens[row][order][None], [position])[0])

    def _after_penalties(self, logits: Reals, tokens: Ints) -> Reals:
        params = self._params
        counts = np.array([self._emitted[token] for token in tokens.tolist()], np.float32)
        seen = (counts > 0) | np.array([token in self._in_prompt for token in tokens.tolist()])
        repeated = np.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        penalised: Reals = np.where(seen, repeated, logits)
        penalised -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        return penalised


def kept_weights(logits: Reals, params: SamplingParams) -> NDArray[np.float64]:
    """Weights [R, k] from which a token is drawn, 0 for what is cut off, not normalised. logits: [R, k], best first.

    Temperature first, then top_k, top_p and min_p, each over what the one before has left; the likeliest always stays.
    """
    temperature = 1.0 if params.temperature is None else params.temperature
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose weight is 0
        weights = np.exp((logits.astype(np.float64) - logits[:, :1]) / temperature)
    if params.top_k:
        weights[:, params.top_k :] = 0
    if params.top_p:
        share = weights / weights.sum(axis=-1, keepdims=True)
        weights[share.cumsum(axis=-1) - share >= params.top_p] = 0
    if params.min_p:
        weights[weights < params.min_p * weights[:, :1]] = 0
    return weights
