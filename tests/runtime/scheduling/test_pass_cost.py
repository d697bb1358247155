"""The cost of passes: measured cells, interpolation between them, and what observed passes change."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.runtime.scheduling.pass_cost import EngineName, PassCost


def seconds(engine: EngineName, batch: int, step: int) -> float:
    """A machine that is memory-bound up to 8 tokens and compute-bound beyond."""
    return (2 if engine == "diffusion" else 1) * 1e-3 * max(1.0, batch * step / 8)


def test_cells_are_measured_and_interpolated_between() -> None:
    cost = PassCost(8, 32)
    cost.measure(seconds, seconds=1e9)
    for engine in ("ar", "diffusion"):
        for batch, step in ((1, 1), (1, 16), (4, 8), (8, 32)):
            assert cost.seconds(engine, batch, step) == pytest.approx(seconds(engine, batch, step))
    assert cost.seconds("ar", 1, 24) == pytest.approx(3e-3)
    assert cost.seconds("ar", 6, 12) == pytest.approx(9e-3)
    assert cost.seconds("ar", 1, 6) == pytest.approx(1e-3)


class Clock:
    """A clock that passes advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_pass_that_is_not_possible_is_not_run_and_costs_what_the_largest_possible_does() -> None:
    cost, run = PassCost(8, 32), []

    def only_small(engine: EngineName, batch: int, step: int) -> float:
        run.append((batch, step))
        return seconds(engine, batch, step)

    cost.measure(only_small, seconds=1e9, possible=lambda batch, step: batch <= 2 and batch * step <= 16)
    assert max(batch * step for batch, step in run) == 16
    assert cost.seconds("ar", 8, 32) == pytest.approx(seconds("ar", 1, 16))
    assert cost.least_seconds("ar", 8, 32) < cost.seconds("ar", 8, 32) / 2


def test_the_time_to_measure_is_split_between_the_engines_and_kept() -> None:
    """An unmeasured pass costs what the largest measured pass does, until it is observed."""
    cost, clock, run = PassCost(8, 32), Clock(), Counter[str]()

    def slow(engine: EngineName, batch: int, step: int) -> float:
        run[engine] += 1
        clock.now += 0.01
        return seconds(engine, batch, step)

    cost.measure(slow, seconds=0.2, clock=clock)
    assert run == {"ar": 12, "diffusion": 12}  # three trials of four cells: 0.12 s exceed 0.1 s
    assert cost.seconds("ar", 1, 1) == pytest.approx(1e-3)
    assert cost.seconds("ar", 8, 32) == pytest.approx(1e-3)
    for _ in range(8):
        cost.observe("ar", 8, 32, 32e-3)
    assert cost.seconds("ar", 8, 32) == pytest.approx(32e-3, rel=0.05)


def test_the_smallest_pass_is_measured_even_without_time() -> None:
    cost = PassCost(8, 32)
    cost.measure(seconds, seconds=0.0, clock=Clock())
    assert cost.seconds("diffusion", 1, 1) == pytest.approx(2e-3)


def test_larger_passes_than_the_table_has_cost_in_proportion() -> None:
    cost = PassCost(2, 8)
    cost.measure(seconds, seconds=1e9)
    assert cost.seconds("ar", 6, 16) == pytest.approx(6 * cost.seconds("ar", 2, 8))
    cost.observe("ar", 6, 16, 1.0)


@given(batch=st.integers(1, 16), step=st.integers(1, 256), taken=st.floats(1e-6, 10))
def test_passes_that_run_correct_the_cost(batch: int, step: int, taken: float) -> None:
    cost = PassCost(16, 256)
    cost.measure(seconds, seconds=1e9)
    for _ in range(400):
        cost.observe("ar", batch, step, taken)
    assert cost.seconds("ar", batch, step) == pytest.approx(taken, rel=0.02)


def test_a_slower_machine_is_slower_for_passes_that_have_not_run() -> None:
    cost = PassCost(4, 16)
    cost.measure(seconds, seconds=1e9)
    passes = [(engine, 2, step) for engine in ("ar", "diffusion") for step in (8, 16)]
    for factor in (1, 1.5):
        for _ in range(50):
            for engine, batch, step in passes:
                cost.observe(engine, batch, step, factor * seconds(engine, batch, step))
    for engine in ("ar", "diffusion"):
        assert cost.seconds(engine, 2, 16) == pytest.approx(1.5 * seconds(engine, 2, 16), rel=0.01)
        assert cost.seconds(engine, 1, 8) == pytest.approx(1.5 * seconds(engine, 1, 8), rel=0.25)


def test_a_wrongly_measured_cell_is_corrected_relative_to_others() -> None:
    cost = PassCost(4, 16)
    cost.measure(lambda engine, batch, step: seconds(engine, batch, step) * (2 if step == 8 else 1), seconds=1e9)
    for _ in range(400):
        for step in (8, 16):
            cost.observe("ar", 1, step, seconds("ar", 1, step))
    assert cost.seconds("ar", 1, 16) / cost.seconds("ar", 1, 8) == pytest.approx(2, rel=0.02)


def test_one_disturbed_pass_moves_little() -> None:
    cost = PassCost(4, 16)
    cost.measure(seconds, seconds=1e9)
    for _ in range(20):
        cost.observe("ar", 1, 8, seconds("ar", 1, 8))
    before = cost.seconds("ar", 1, 8)
    cost.observe("ar", 1, 8, 1000 * before)
    assert before < cost.seconds("ar", 1, 8) < 1.2 * before
    for _ in range(3):
        cost.observe("ar", 1, 8, before)
    assert cost.seconds("ar", 1, 8) == pytest.approx(before, rel=0.1)


class Doubting(PassCost):
    """A table of one cell for each of the steps 1 and 16."""

    def __init__(self) -> None:
        super().__init__(1, 16)
        self.measure(self.true_seconds, seconds=1e9)

    def true_seconds(self, _engine: EngineName, _batch: int, step: int) -> float:
        return 1e-5 if step == 1 else 1e-3

    def doubt(self, step: int) -> float:
        return math.log(self.seconds("ar", 1, step) / self.least_seconds("ar", 1, step))

    def met(self, step: int, passes: int, factor: float = 1.0) -> None:
        for _ in range(passes):
            self.observe("ar", 1, step, factor * self.true_seconds("ar", 1, step))


def test_doubt_grows_until_the_pass_runs_again() -> None:
    cost = Doubting()
    assert cost.doubt(1) == cost.doubt(16) == 0
    cost.met(step=1, passes=10)
    assert cost.doubt(1) < 0.01
    grown = cost.doubt(16)
    assert grown > 0.3
    for _ in range(2):
        cost.met(step=16, passes=1)
        assert cost.doubt(16) < 0.1
        cost.met(step=1, passes=10)
        assert cost.doubt(16) < grown / 3  # it proved right: more slowly from now on
        grown = cost.doubt(16)
    assert grown < 0.05
    cost.met(step=16, passes=2, factor=100)
    before = cost.doubt(16)
    cost.met(step=1, passes=1)
    assert cost.doubt(16) > before + 0.03  # it proved wrong: fast again


def test_a_pass_takes_no_less_than_a_shorter_one_that_was_just_met() -> None:
    cost = Doubting()
    cost.met(step=1, passes=1000)
    assert cost.doubt(16) == pytest.approx(math.log(100))  # from 1 ms down to the 0.01 ms of step 1
    assert cost.least_seconds("diffusion", 1, 16) < 0.2 * cost.least_seconds("ar", 1, 16)  # where none was met


def test_a_stale_cell_is_corrected_at_once() -> None:
    cost = Doubting()
    cost.met(step=1, passes=200)
    cost.met(step=16, passes=1, factor=50)
    assert cost.seconds("ar", 1, 16) == pytest.approx(50e-3, rel=0.1)


def test_a_single_delay_counts_little_and_a_second_one_in_full() -> None:
    cost = Doubting()
    cost.met(step=1, passes=20)
    cost.met(step=1, passes=1, factor=50)
    assert cost.seconds("ar", 1, 1) < 1.2e-5
    cost.met(step=1, passes=1, factor=50)
    assert cost.seconds("ar", 1, 1) > 1.5e-5


def test_doubt_is_bounded() -> None:
    cost = PassCost(1, 2)
    for _ in range(100_000):
        cost.observe("ar", 1, 1, 1e-3)
    assert cost.least_seconds("ar", 1, 2) > 1e-4 * cost.seconds("ar", 1, 2)
