"""An even number of rows in every product, for engines with int8 activations.

ONNX Runtime computes an int4 product with int8 activations two rows at a time. It leaves the last row of an odd number
to another kernel, which rounds differently. A token that AR decodes would then get other logits than the same token
inside a verified block. So steps are padded here until the numbers of tokens and of logit rows are even. A step of two
tokens takes about 1.2 times as long as a step of one.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.executor import BidirectionalStep, CausalStep

Scalar = TypeVar("Scalar", bound=np.generic)


def with_even_rows(step: CausalStep | BidirectionalStep) -> CausalStep | BidirectionalStep:
    """The step with an even number of tokens and of logit rows over the whole batch.

    Each sequence gets one padding token if need be. No other token sees it, and its KV row lies behind the rows of the
    step. The last logit row is repeated if need be.
    """
    if step.batch % 2 == 0:
        return step
    if step.logit_rows.shape[1] % 2:
        step = dataclasses.replace(
            step,
            logit_rows=_padded(step.logit_rows, 0),
            token_mask=None if step.token_mask is None else _last_repeated(step.token_mask),
            asked_ids=None if step.asked_ids is None else _last_repeated(step.asked_ids),
        )
    if step.input_ids.shape[1] % 2 == 0:
        return step
    ids, positions = _padded(step.input_ids, 0), _padded(step.position_ids, 1)
    if isinstance(step, BidirectionalStep):
        return dataclasses.replace(step, input_ids=ids, position_ids=positions)
    mask = np.pad(step.block_mask, ((0, 0), (0, 1), (0, 1)))
    mask[:, -1, -1] = True
    return dataclasses.replace(step, input_ids=ids, position_ids=positions, block_mask=mask)


def _padded(array: NDArray[np.int64], increment: int) -> NDArray[np.int64]:
    """[B, N] with one more column, the last one plus ``increment``."""
    return np.concatenate((array, array[:, -1:] + increment), axis=1)


def _last_repeated(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """[B, N, ...] with one more column, the last one again."""
    return np.concatenate((array, array[:, -1:]), axis=1)
