"""Sampling: from a row's candidates to a token, greedy or drawn under a request's parameters.

A draw inverts the cumulative distribution of the candidates at one uniform number. That number depends on the seed and
the token's position alone, so a draw depends neither on the batch nor on the number of tokens that a pass yields:
sampled self-speculation emits the tokens that sampled AR emits with the same seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trimode.common.errors import TriModeError
from trimode.runtime.executor import Ints, places
from trimode.runtime.request.sampling_params import LogitsProcessor, SamplingParams

Reals = NDArray[np.float32]


class UniformNumbers:
    """Numbers in [0, 1), independent for every (seed, position, draw)."""

    _CHUNK = 64  # positions for each generator: creating one costs more than drawing its numbers

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._chunks: dict[tuple[int, int], NDArray[np.float64]] = {}

    def at(self, positions: Sequence[int], draw: int = 0) -> NDArray[np.float64]:
        """[R] for R positions of one pass. draw: number of the draw at a position; denoise passes repeat positions."""
        first, last = min(positions) // self._CHUNK, max(positions) // self._CHUNK
        numbers = np.concatenate([self._chunk(number, draw) for number in range(first, last + 1)])
        found: NDArray[np.float64] = numbers[np.array(positions) - first * self._CHUNK]
        return found

    def _chunk(self, number: int, draw: int) -> NDArray[np.float64]:
        if (number, draw) not in self._chunks:
            # Positions only grow, so chunks before the previous one are not needed again.
            self._chunks = {key: chunk for key, chunk in self._chunks.items() if key[0] >= number - 1}
            generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, draw, number]))
            self._chunks[number, draw] = generator.random(self._CHUNK)
        return self._chunks[number, draw]


class Sampler:
    """Chooses one sequence's tokens. :meth:`note` records emitted tokens, for the penalties.

    prompt: its tokens count for the repetition penalty; presence and frequency penalties count emitted tokens only.
    depends_on_text: whether the choice of a token depends on the tokens noted before.
    """

    def __init__(self, params: SamplingParams, prompt: Ints, seed: int) -> None:
        self._params = params
        self._numbers = UniformNumbers(seed)
        self._penalised = params.penalised
        self._processor = params.logits_processor
        self.depends_on_text = params.penalised or params.logits_processor is not None
        self._in_prompt = frozenset(prompt.tolist()) if self._penalised else frozenset[int]()
        self._emitted: Counter[int] = Counter()
        self._tokens: list[int] = []  # emitted, for the processor

    def note(self, tokens: list[int]) -> None:
        """Record emitted tokens."""
        if self._penalised:
            self._emitted.update(tokens)
        if self._processor is not None:
            self._tokens += tokens

    def rows(self, logits: Reals, tokens: Ints, positions: Sequence[int], draw: int = 0) -> Ints:
        """One token for each row, [R]; rows are independent. logits, tokens: [R, k], best first."""
        if self._params.greedy:
            return tokens[:, 0]
        weights = kept_weights(logits, self._params)
        cumulative = weights.cumsum(axis=-1)
        reached = cumulative > self._numbers.at(positions, draw)[:, None] * cumulative[:, -1:]
        chosen: Ints = tokens[places(len(tokens)), reached.argmax(axis=-1)]
        return chosen

    def by_row(self, logits: Reals, tokens: Ints, positions: Sequence[int]) -> Callable[[int], int]:
        """A function from a row of a causal pass to its token. With penalties, it depends on the tokens noted before
        the call.
        """
        if not self.depends_on_text:
            chosen: list[int] = self.rows(logits, tokens, positions).tolist()
            return chosen.__getitem__
        return lambda row: self.choose(logits[row], tokens[row], positions[row])

    def choose(self, logits: Reals, tokens: Ints, position: int) -> int:
        """One token from a row's candidates, [k], best first. It may depend on the tokens noted before."""
        if self.depends_on_text:
            if self._penalised:
                logits = self._after_penalties(logits, tokens)
            if self._processor is not None:
                logits = self._processed(self._processor, logits, tokens)
            order = np.argsort(-logits, kind="stable")
            logits, tokens = logits[order], tokens[order]
        if self._params.greedy:
            return int(tokens[0])
        return int(self.rows(logits[None], tokens[None], [position])[0])

    def _processed(self, processor: LogitsProcessor, logits: Reals, tokens: Ints) -> Reals:
        """Raises TriModeError if the processor does not return a number for each candidate."""
        processed = np.asarray(processor(tuple(self._tokens), tokens, logits.copy()), np.float32)
        if processed.shape != logits.shape or np.isnan(processed).any():
            raise TriModeError(f"logits_processor must return {len(logits)} numbers, one for each candidate")
        return processed

    def _after_penalties(self, logits: Reals, tokens: Ints) -> Reals:
        params = self._params
        counts = np.array([self._emitted[token] for token in tokens.tolist()], np.float32)
        seen = (counts > 0) | np.array([token in self._in_prompt for token in tokens.tolist()])
        repeated = np.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        penalised: Reals = np.where(seen, repeated, logits)
        penalised -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        return penalised


def kept_weights(logits: Reals, params: SamplingParams) -> NDArray[np.float64]:
    """Unnormalised weights [R, k] from which a token is drawn, 0 for excluded candidates. logits: [R, k], best first.

    Temperature comes first, then top_k, top_p and min_p, each over the candidates that are left. The most likely
    candidate is never excluded.
    """
    temperature = 1.0 if params.temperature is None else params.temperature
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose weight is 0
        weights = logits.astype(np.float64)
        weights -= logits[:, :1]
        weights /= temperature
        np.exp(weights, out=weights)
    if params.top_k:
        weights[:, params.top_k :] = 0
    if params.top_p:
        share = weights / weights.sum(axis=-1, keepdims=True)
        weights[share.cumsum(axis=-1) - share >= params.top_p] = 0
    if params.min_p:
        weights[weights < params.min_p * weights[:, :1]] = 0
    return weights
