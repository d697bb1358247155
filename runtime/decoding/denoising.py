"""Which masked positions of a block a denoise pass settles, by the confidence in the tokens chosen for them.

The most confident one is always settled, so that a block is full after as many passes as it has masks. ``threshold``
and ``quota`` are the model card's; ``top_n``, ``factor`` and ``product`` are other samplers in use with the family.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.request.sampling_params import DEFAULT_THRESHOLD, SamplingParams


def settled(confidence: NDArray[np.floating], params: SamplingParams, masks: int, done: int) -> NDArray[np.bool_]:
    """[M] bool for M masked positions. confidence: [M], probabilities. masks: positions masked when the block was laid
    out. done: denoise passes that it has had.
    """
    threshold = DEFAULT_THRESHOLD if params.threshold is None else params.threshold
    chosen = np.zeros(len(confidence), np.bool_)
    chosen[confidence.argmax()] = True
    policy = params.denoising or "threshold"
    if policy == "threshold":
        return chosen | (confidence >= threshold)
    order = np.argsort(-confidence, kind="stable")
    if policy == "quota":
        run = quota(masks, params.denoising_steps or params.longest_block, done)
    elif policy == "top_n":
        run = params.denoising_top_n or 1
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
    """An even share of the masks for each of ``steps`` passes, the remainder in the first ones; at least one."""
    share, remainder = divmod(masks, steps)
    return max(1, share + (done < remainder))
