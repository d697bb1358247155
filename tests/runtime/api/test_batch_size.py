"""The number of sequences that run at once, by what the engine was built for."""

from __future__ import annotations

import pytest

from trimode.common.errors import TriModeError
from trimode.engine.manifest import Limits
from trimode.runtime.api.batch_size import batch_size_of


def limits(max_batch: int | None) -> Limits:
    max_step = None if max_batch is None else 64
    return Limits(capacity=96, prefill_step=64, top_k=4, max_batch=max_batch, max_step=max_step)


@pytest.mark.parametrize(
    ("built", "wanted", "expected"),
    [(None, None, 16), (None, 99, 99), (4, None, 4), (64, None, 16), (64, 64, 64), (4, 1, 1)],
)
def test_sequences_that_run_at_once(built: int | None, wanted: int | None, expected: int) -> None:
    assert batch_size_of(limits(built), wanted) == expected


def test_more_than_the_engine_was_built_for_is_refused_in_one_line() -> None:
    with pytest.raises(TriModeError) as caught:
        batch_size_of(limits(4), 5)
    assert str(caught.value) == (
        "max_batch_size is 5, but the engine was built for batches of 4; lower it, or build with --max-batch 5"
    )
