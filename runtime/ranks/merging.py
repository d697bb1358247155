"""The candidates of the whole vocabulary, from those of each rank's part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.executor import AnyStep, Candidates, Ints, Words


def merged(parts: Sequence[Candidates], top_k: int, tokens: int, asked_ids: Ints | None) -> Candidates:
    """parts: by rank, with tokens and asked ids counted from the rank's first token; as many candidates as that rank's
    part of the vocabulary has, or ``top_k``. tokens: of a rank's part.

    The best come first, and of equal logits the lowest token id. The result is exact: the best of the whole vocabulary
    are among the best of the parts.
    """
    logits = np.concatenate([part.logits for part in parts], axis=-1)
    ids = np.concatenate([part.tokens + rank * tokens for rank, part in enumerate(parts)], axis=-1)
    order = np.lexsort((ids, -logits))[..., :top_k]
    # In fp64 and in the order of ranks. -1e30, of a part without a legal token, adds nothing.
    total = parts[0].log_sum_exp.astype(np.float64)
    for part in parts[1:]:
        total = np.logaddexp(total, part.log_sum_exp)
    return Candidates(
        np.take_along_axis(logits, order, axis=-1),
        np.take_along_axis(ids, order, axis=-1),
        total.astype(np.float32),
        None if asked_ids is None else _asked(parts, tokens, asked_ids),
    )


def _asked(parts: Sequence[Candidates], tokens: int, asked_ids: Ints) -> NDArray[np.float32]:
    """Each asked token's logit, from the rank that holds the token."""
    found = np.stack([part.asked_logits for part in parts if part.asked_logits is not None])
    chosen: NDArray[np.float32] = np.take_along_axis(found, (asked_ids // tokens)[None], axis=0)[0]
    return chosen


def local_step(step: AnyStep, tokens: slice, top_k: int) -> AnyStep:
    """The step with a rank's part of the vocabulary. top_k: the most candidates of the rank."""
    return dataclasses.replace(
        step,
        top_k=min(step.top_k or top_k, top_k),
        token_mask=None if step.token_mask is None else local_mask(step.token_mask, tokens),
        asked_ids=None if step.asked_ids is None else local_ids(step.asked_ids, tokens),
    )


def local_ids(asked_ids: Ints, tokens: slice) -> Ints:
    """Asked ids as a rank counts them. For those of other ranks, any of its own tokens."""
    ids: Ints = np.clip(asked_ids - tokens.start, 0, tokens.stop - tokens.start - 1)
    return ids


def local_mask(token_mask: Words, tokens: slice) -> Words:
    """The bits of a rank's tokens, in words that begin with its first token."""
    bits = np.unpackbits(np.ascontiguousarray(token_mask, "<u4").view(np.uint8), axis=-1, bitorder="little")[
        ..., tokens
    ]
    padding = -bits.shape[-1] % 32
    packed = np.packbits(np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, padding)]), axis=-1, bitorder="little")
    return packed.view("<u4")
