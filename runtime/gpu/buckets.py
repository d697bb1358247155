"""Shapes of passes, few enough that each can have a CUDA graph of its own.

A graph is good for one shape and one set of addresses. So a step's length, the rows it wants logits of, and its window
are rounded up to a few values. Its batch is not: a padded sequence would write into the slot of a real one.
"""

from __future__ import annotations

from typing import NamedTuple

from trimode.runtime.executor import Step

SMALLEST_WINDOW = 256


class Bucket(NamedTuple):
    """The shape of a pass, and the slot its batch begins at; ``step``, ``rows`` and ``window`` as padded."""

    kind: type[Step]
    first_slot: int
    batch: int
    step: int
    rows: int
    window: int


def bucket_of(step: Step, max_step: int, capacity: int, windowed: bool) -> Bucket:
    """The bucket of a step that fits: at most ``max_step`` tokens, and no row at or past ``capacity``.

    windowed: whether the plan attends to a window; one that attends to the pool in place has all of it for a window.
    Padded or not, a step stays below ``capacity``: where the next larger length would not, it is not padded.
    """
    batch, length = step.input_ids.shape
    committed = int(step.write_indices.max())
    padded = _rounded(length, 1, max_step)
    if committed + padded > capacity:
        padded = length
    rows = 1 if step.logit_rows.shape[1] == 1 else padded
    window = _rounded(committed + padded, SMALLEST_WINDOW, capacity) if windowed else capacity
    return Bucket(type(step), step.first_slot, batch, padded, rows, window)


def _rounded(number: int, smallest: int, largest: int) -> int:
    """The next power of two from ``smallest`` on, or ``largest`` where that is less."""
    return min(max(smallest, 1 << (number - 1).bit_length()), largest)
