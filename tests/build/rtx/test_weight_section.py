"""The weights that two plans share are found, cut out and restored, even if private bytes lie between them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.build.rtx.weight_section import cut_runs, find_shared_runs
from trimode.engine.plan_file import whole_plan

LARGE = 600_000  # bytes of a shared run: more than twice the search distance
sizes = st.integers(0, 5000)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.tuples(sizes, sizes),
    gaps=st.tuples(sizes, sizes),
    tails=st.tuples(sizes, sizes),
)
def test_plans_with_private_bytes_are_restored(
    seed: int, heads: tuple[int, int], gaps: tuple[int, int], tails: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    shared = [rng.bytes(LARGE), rng.bytes(LARGE)]
    plans = [
        rng.bytes(head) + shared[0] + rng.bytes(gap) + shared[1] + rng.bytes(tail)
        for head, gap, tail in zip(heads, gaps, tails, strict=True)
    ]
    first, second = (np.frombuffer(plan, np.uint8) for plan in plans)
    runs = find_shared_runs(first, second, shared[1][:64])
    assert sum(run.length for run in runs) >= 2 * LARGE
    for run in runs:
        assert plans[0][run.first : run.first + run.length] == plans[1][run.second : run.second + run.length]
    with TemporaryDirectory() as folder:
        pool = Path(folder) / "pool.bin"
        for index, (plan, into) in enumerate(zip(plans, (pool, None), strict=True)):
            path = Path(folder) / f"{index}.plan"
            path.write_bytes(plan)
            entry = cut_runs(path, [(run[index], run.length) for run in runs], into)
            assert path.stat().st_size == entry.private_bytes == len(plan) - sum(run.length for run in runs)
            assert b"".join(whole_plan(path, pool, entry)) == plan


def test_a_constant_that_differs_splits_the_run() -> None:
    rng = np.random.default_rng(0)
    plan = np.frombuffer(rng.bytes(2 * LARGE), np.uint8)
    other = plan.copy()
    other[LARGE] ^= 1
    runs = find_shared_runs(plan, other, plan[:64].tobytes())
    assert [(run.first, run.length) for run in runs] == [(0, LARGE), (LARGE + 1, LARGE - 1)]


def test_a_plan_without_the_probe_is_refused() -> None:
    plan = np.zeros(1000, np.uint8)
    with pytest.raises(RuntimeError, match="embedding table"):
        find_shared_runs(plan, plan, b"absent")
