"""Buckets: the few shapes that steps are padded to, each with its own CUDA graph.

A graph serves one shape and one set of addresses. Therefore a step's length, its number of logit rows and its window
are rounded up to a few values; so is the number of asked ids. Token masks and asked ids take 16 kB and more a row, so
only the buckets of passes that have them hold them.

The batch of a step is not changed here, because a padded sequence needs a slot and the number of its committed rows.
The scheduler asks :func:`padded_slots` for the slots of a pass before it makes the step.
"""

from __future__ import annotations

from typing import NamedTuple

from trimode.runtime.executor import Step

SMALLEST_WINDOW = 256
# A pass of up to so many tokens takes nearly the time of one token: its products have one tile of rows.
CHEAP_TOKENS = 64
# Of larger passes, the part of the sequences that may be padding.
MOST_PADDING = 1 / 8


class Bucket(NamedTuple):
    """The shape of a pass, and the first slot of its batch. ``step``, ``rows``, ``window`` and ``asked`` are padded.

    top_k: candidates that the pass returns for each row. masked: whether its rows have token masks. asked: asked ids of
    each row; 0 for none.
    """

    kind: type[Step]
    first_slot: int
    batch: int
    step: int
    rows: int
    window: int
    top_k: int
    masked: bool
    asked: int


def bucket_of(step: Step, max_step: int, capacity: int, windowed: bool, top_k: int) -> Bucket:
    """The bucket of a step of at most ``max_step`` tokens whose rows are all below ``capacity``.

    windowed: whether the engine attends to a window; otherwise it attends to the pool in place, and the window is the
    capacity. A step that would exceed the capacity when padded is not padded. top_k: candidates of a row that the
    engine returns for this step.
    """
    batch, length = step.input_ids.shape
    committed = int(step.write_indices.max())
    padded = _rounded(length, 1, max_step)
    if committed + padded > capacity:
        padded = length
    masked, rows = step.token_mask is not None, step.logit_rows.shape[1]
    if masked or step.asked:  # these inputs are large, and rows with them few
        rows = _rounded(rows, 1, max_step)
    elif rows > 1:
        rows = padded
    window = _rounded(committed + padded, SMALLEST_WINDOW, capacity) if windowed else capacity
    asked = _power_of_two(step.asked) if step.asked else 0
    return Bucket(type(step), step.first_slot, batch, padded, rows, window, top_k, masked, asked)


def padded_slots(first: int, last: int, step: int, slots: int) -> tuple[int, int]:
    """The first and the last slot of a pass that covers the slots ``first`` to ``last``, of ``slots`` in the pool.

    Passes over few ranges of slots result: a pass begins at slot 0 and its batch is a power of two, if it then has at
    most :data:`CHEAP_TOKENS` tokens. The batch of a larger pass is rounded up to a few numbers.
    """
    tokens = _power_of_two(step)
    whole = min(_power_of_two(last + 1), slots)
    if whole * tokens <= CHEAP_TOKENS:
        return 0, whole - 1
    batch = last - first + 1
    if _few_batches(last + 1) <= batch * (1 + MOST_PADDING):
        first, batch = 0, last + 1
    return first, min(first + _few_batches(batch), slots) - 1


def _few_batches(batch: int) -> int:
    """The batch, rounded up to a multiple of an eighth of the power of two that is not above it."""
    unit = max(1, int(_power_of_two(batch + 1) // 2 * MOST_PADDING))
    return -(-batch // unit) * unit


def _rounded(number: int, smallest: int, largest: int) -> int:
    """The next power of two that is at least ``smallest``, but at most ``largest``."""
    return min(max(smallest, _power_of_two(number)), largest)


def _power_of_two(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
