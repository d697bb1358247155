"""How many sequences of an engine run at once."""

from __future__ import annotations

from trimode.common.errors import TriModeError
from trimode.engine.manifest import Limits

DEFAULT_BATCH_SIZE = 16


def batch_size_of(limits: Limits, wanted: int | None) -> int:
    """``wanted``; if it is None, 16, or what the engine was built for if that is less.

    limits: of the engine. Raises TriModeError for more than it was built for.
    """
    largest = limits.max_batch
    if wanted is None:
        return min(DEFAULT_BATCH_SIZE, largest or DEFAULT_BATCH_SIZE)
    if largest is not None and wanted > largest:
        raise TriModeError(
            f"max_batch_size is {wanted}, but the engine was built for batches of {largest}; lower it, or build with "
            f"--max-batch {wanted}"
        )
    return wanted
