"""Token masks, and the results of masked rows as the step contract defines them, from complete logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trimode.model.step import mask_words
from trimode.runtime.executor import Candidates, Words

NEVER = np.float32(-1e30)


def packed(legal: NDArray[np.bool_]) -> Words:
    """One bit for each token: [..., vocabulary] to [..., words]."""
    words = np.zeros((*legal.shape[:-1], mask_words(legal.shape[-1])), np.uint32)
    for token in range(legal.shape[-1]):
        words[..., token // 32] |= legal[..., token].astype(np.uint32) << np.uint32(token % 32)
    return words


def best_legal(logits: NDArray[np.float32], legal: NDArray[np.bool_], mask_token: int, top_k: int) -> Candidates:
    """The candidates of rows with these logits [B, R, vocabulary]."""
    legal = legal.copy()
    legal[..., mask_token] = False
    possible = np.where(legal, logits, NEVER)
    order = np.argsort(-possible, axis=-1, kind="stable")[..., :top_k]
    best = possible.max(axis=-1, keepdims=True)
    total = np.where(legal, np.exp(possible.astype(np.float64) - best), 0).sum(axis=-1)
    with np.errstate(divide="ignore"):
        log_sum_exp = np.where(total > 0, np.log(total) + best[..., 0], NEVER)
    return Candidates(np.take_along_axis(possible, order, -1), order, log_sum_exp.astype(np.float32))


def random_legal(rng: np.random.Generator, batch: int, rows: int, vocabulary: int) -> NDArray[np.bool_]:
    """Rows of all kinds: few legal tokens, most of them, all, one, none."""
    shares = rng.permuted(np.resize([0.02, 0.9, 1.0, 0.5], batch * rows)).reshape(batch, rows, 1)
    legal = rng.random((batch, rows, vocabulary)) < shares
    if rows > 2:
        legal[0, 1] = False
        legal[0, 1, 300] = True
        legal[-1, 2] = False
    return legal
