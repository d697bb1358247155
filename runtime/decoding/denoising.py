"""Denoising policies: which masked positions of a block a denoise pass settles, by confidence.

Confidence is the probability of the token chosen for a position. Every policy settles the most confident position, so a
block with M masks is full after M passes at most. ``threshold`` and ``quota`` are the model card's policies; ``top_n``,
``factor`` and ``product`` are other published ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.request.sampling_params import DEFAULT_THRESHOLD, SamplingParams


def settled(confidence: NDArray[np.floating], params: SamplingParams, masks: int, done: int) -> NDArray[np.bool_]:
    """The positions to settle: [M] bool for M masked positions.

    confidence: [M]. masks: masked positions before the block's first denoise pass. done: its denoise passes so far.
    """
    threshold = DEFAULT_THRESHOLD if params.threshold is None else params.threshold
    chosen = np.zeros(len(confidence), np.bool_)
    chosen[confidence.argmax()] = True
    policy = params.denoising or "threshold"
    if policy == "threshold":
        return chosen | (confidence >= threshold)
    order = np.argsort(-confidence, kind="stable")
    run: int | None
    if policy == "quota":
        run = quota(masks, params.denoising_steps or params.longest_block, done)
    elif policy == "top_n":
        run = params.denoising_top_n
    else:
        ranked = confidence[order]
        holds = (
            ranked >= 1 - threshold / (np.arange(len(ranked)) + 2)
            if policy == "factor"
            else ranked.cumprod() >= threshold
        )
        run = len(holds) if holds.all() else int(holds.argmin())
    chosen[order[:run]] = True
    return chosen


def quota(masks: int, steps: int, done: int) -> int:
    """Masks to settle in one of ``steps`` passes: an even share, the remainder in the first passes, at least one."""
    share, remainder = divmod(masks, steps)
    return max(1, share + (done < remainder))
