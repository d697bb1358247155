"""The cost of passes: measured cells, interpolation between them, and what observed passes change."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.runtime.scheduling.pass_cost import EngineName, PassCost, fastest_trial


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


def test_a_pass_that_is_not_possible_is_not_run_and_costs_what_its_tokens_would() -> None:
    cost, run = PassCost(8, 32), []

    def only_small(engine: EngineName, batch: int, step: int) -> float:
        run.append((batch, step))
        return seconds(engine, batch, step)

    cost.measure(only_small, seconds=1e9, possible=lambda batch, step: batch <= 2 and batch * step <= 16)
    assert max(batch * step for batch, step in run) == 16
    assert cost.seconds("ar", 8, 32) == pytest.approx(16 * seconds("ar", 1, 16))
    assert cost.seconds("ar", 4, 2) == pytest.approx(seconds("ar", 1, 8))
    assert cost.least_seconds("ar", 8, 32) < cost.seconds("ar", 8, 32) / 2


def test_between_measured_passes_seconds_are_interpolated_by_the_logarithm_of_their_tokens() -> None:
    """4 tokens are half way from 2 to 8."""
    cost = PassCost(1, 8)
    cost.measure(lambda _engine, _batch, step: {1: 1.0, 2: 1.0, 8: 9.0}[step], 1e9, lambda _, step: step != 4)
    assert cost.seconds("ar", 1, 4) == pytest.approx(3.0)


def test_a_pass_is_measured_only_if_there_is_time_for_its_tokens() -> None:
    """A pass takes a second for each token. Three trials of all passes but the largest take 99 s, and its own 48 s."""
    for seconds_of_each, largest in ((140, False), (150, True)):
        cost, clock, run = PassCost(4, 4), Clock(), set[tuple[EngineName, int, int]]()

        def slow(engine: EngineName, batch: int, step: int, clock: Clock = clock, run: Any = run) -> float:
            clock.now += batch * step
            run.add((engine, batch, step))
            return float(batch * step)

        cost.measure(slow, 2 * seconds_of_each, clock=clock)
        for engine in ("ar", "diffusion"):
            expected = {(engine, batch, step) for batch in (1, 2, 4) for step in (1, 2, 4)}
            assert {each for each in run if each[0] == engine} == expected - (set() if largest else {(engine, 4, 4)})


def test_the_time_to_measure_is_split_between_the_engines_and_kept() -> None:
    """The four shortest steps of one sequence are measured. A larger pass costs proportionally more."""
    cost, clock, run = PassCost(8, 32), Clock(), Counter[str]()

    def slow(engine: EngineName, batch: int, step: int) -> float:
        run[engine] += 1
        clock.now += 0.01
        return seconds(engine, batch, step)

    cost.measure(slow, seconds=0.2, clock=clock)
    assert run == {"ar": 12, "diffusion": 12}  # three trials of four cells: 0.12 s exceed 0.1 s
    assert cost.seconds("ar", 1, 1) == pytest.approx(1e-3)
    assert cost.seconds("ar", 8, 32) == pytest.approx(32e-3)
    assert cost.seconds("ar", 4, 2) == pytest.approx(1e-3)
    for _ in range(8):
        cost.observe("ar", 8, 32, 64e-3)
    assert cost.seconds("ar", 8, 32) == pytest.approx(64e-3, rel=0.05)


def test_one_sequence_and_steps_of_one_token_are_measured_first() -> None:
    cost, run = PassCost(4, 4), list[tuple[int, int]]()

    def noting(engine: EngineName, batch: int, step: int) -> float:
        if engine == "ar":
            run.append((batch, step))
        return seconds(engine, batch, step)

    cost.measure(noting, seconds=1e9)
    assert run[::3] == [(1, 1), (1, 2), (1, 4), (2, 1), (4, 1), (2, 2), (2, 4), (4, 2), (4, 4)]


def test_a_pass_that_would_exceed_the_time_is_not_measured() -> None:
    """Three trials of 8 tokens would take 6 ms, and a little less is left for each engine."""
    cost, clock, run = PassCost(1, 16), Clock(), list[int]()

    def timed(_engine: EngineName, _batch: int, step: int) -> float:
        run.append(step)
        clock.now += step / 4e3
        return step / 4e3

    cost.measure(timed, seconds=2 * (3 * (1 + 2 + 4) / 4e3 + 3 * 8 / 4e3 - 1e-4), clock=clock)
    assert run == 2 * [1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert cost.seconds("ar", 1, 16) == pytest.approx(4e-3)


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


@pytest.mark.parametrize("factor", [0.7, 1.2, 1.4])
def test_costs_keep_their_proportions_through_a_slow_or_fast_period(factor: float) -> None:
    """Also if another block is chosen when it ends, whose cell was not met since."""
    cost = PassCost(1, 32)
    cost.measure(seconds, seconds=1e9)
    for step, slower, passes in ((8, 1, 200), (8, factor, 50), (16, 1, 50)):
        for _ in range(passes):
            for engine in ("ar", "diffusion"):
                cost.observe(engine, 1, step, slower * seconds(engine, 1, step))
    for engine in ("ar", "diffusion"):
        assert cost.seconds(engine, 1, 16) == pytest.approx(seconds(engine, 1, 16), rel=0.03)
        for step in (1, 8, 32):
            assert cost.seconds(engine, 1, step) == pytest.approx(seconds(engine, 1, step), rel=0.18)


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


class Filter:
    """The costs of one engine's passes of one sequence and 1, 2, 4 tokens, by plain arithmetic: a Kalman filter."""

    def __init__(self) -> None:
        self.logs = {step: math.log((64 + step) * 1e-5) for step in (1, 2, 4)}
        self.known = dict.fromkeys(self.logs, math.log(8))  # doubt when last met
        self.growth = dict.fromkeys(self.logs, math.log(2) / 4)
        self.met_at = dict.fromkeys(self.logs, 0)
        self.errors = dict.fromkeys(self.logs, 0.0)
        self.pace, self.pace_doubt, self.passes = 0.0, math.log(4), 0

    def doubt(self, step: int) -> float:
        return min(math.log(1000), self.known[step] + self.growth[step] * (self.passes - self.met_at[step]))

    @staticmethod
    def weights(step: int) -> dict[int, float]:
        return {2: 2 - math.log2(3), 4: math.log2(3) - 1} if step == 3 else {step: 1.0}

    def log_seconds(self, step: int) -> float:
        return self.pace + sum(weight * self.logs[cell] for cell, weight in self.weights(step).items())

    def log_least(self, step: int) -> float:
        least, shorter = {}, -math.inf
        for cell in (1, 2, 4):
            shorter = least[cell] = min(self.logs[cell], max(shorter, self.logs[cell] - self.doubt(cell)))
        return self.pace + sum(weight * least[cell] for cell, weight in self.weights(step).items())

    def observe(self, step: int, log_seconds: float) -> None:
        weights, expected = self.weights(step), self.log_seconds(step)
        doubts = {cell: self.doubt(cell) for cell in weights}
        nearest = max(weights, key=lambda cell: weights[cell])
        error, most = log_seconds - expected, max(math.log(4), *doubts.values())
        # A delay counts in full if the cell was in doubt, or if the pass before it was slow too.
        counted = max(-most, min(error, most, max(0.3, self.errors[nearest], *doubts.values())))
        self.errors[nearest] = error
        # A known cell moves no more than the pace, unless it is another one now.
        known = {cell: self.growth[cell] <= math.log(2) / 16 and abs(counted) <= math.log(2) for cell in weights}
        counts = {cell: max(min(doubts[cell], 0.3 if known[cell] else math.inf), 0.2) for cell in weights}
        variances = {cell: (weight * counts[cell]) ** 2 for cell, weight in weights.items()}
        total = self.pace_doubt**2 + sum(variances.values()) + 0.4**2
        self.pace += counted * self.pace_doubt**2 / total
        for cell, weight in weights.items():
            self.logs[cell] += counted * variances[cell] / total / weight
        remaining = abs(expected + counted - self.log_seconds(step))
        self.pace_doubt = max(0.3, (self.pace_doubt + min(2 * remaining, math.log(4))) / 2)
        self.passes += 1
        if abs(counted) > math.log(2) + max(doubts.values()):  # it was met lately, and is another one now
            for cell in self.logs:
                self.known[cell], self.met_at[cell] = self.doubt(cell), self.passes
                self.growth[cell] = max(self.growth[cell], math.log(2) / 16)
        for cell, weight in weights.items():
            if weight >= 0.5 and abs(counted) < math.log(1.5):
                self.growth[cell] = max(math.log(2) / 1024, self.growth[cell] / 4)
            elif abs(counted) > math.log(2):
                self.growth[cell] = math.log(2) / 4
            self.known[cell] = (1 - weight) * doubts[cell] + weight * remaining
            self.met_at[cell] = self.passes


@settings(deadline=None)
@given(
    passes=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([-0.1, 0.1, 0.35, 0.5, 0.9, -0.9, 1.6, -1.6, 4, -4])),
        max_size=40,
    )
)
def test_observations_move_cells_and_pace_as_the_filter_says(passes: list[tuple[int, float]]) -> None:
    """Passes that differ from the expectation by errors of all sizes."""
    cost, plain = PassCost(1, 4), Filter()
    for step, error in passes:
        log_seconds = plain.log_seconds(step) + error
        plain.observe(step, log_seconds)
        cost.observe("ar", 1, step, math.exp(log_seconds))
        for each in (1, 2, 3, 4):
            assert math.log(cost.seconds("ar", 1, each)) == pytest.approx(plain.log_seconds(each), abs=1e-9)
            assert math.log(cost.least_seconds("ar", 1, each)) == pytest.approx(plain.log_least(each), abs=1e-9)


def test_trial_passes_are_no_larger_than_the_largest() -> None:
    run: set[tuple[int, int]] = set()

    def noted(engine: EngineName, batch: int, step: int) -> float:
        run.add((batch, step))
        return seconds(engine, batch, step)

    PassCost(3, 20).measure(noted, seconds=1e9)
    assert run == {(batch, step) for batch in (1, 2, 3) for step in (1, 2, 4, 8, 16, 20)}


def test_the_fastest_of_three_trials_counts_and_is_not_in_doubt() -> None:
    cost, taken = PassCost(1, 1), iter([3e-3, 5e-3, 4e-3, 7e-3, 8e-3, 9e-3])
    cost.measure(lambda *_: next(taken), seconds=1e9)
    for engine, expected in (("ar", 3e-3), ("diffusion", 7e-3)):
        assert cost.seconds(engine, 1, 1) == pytest.approx(expected)  # type: ignore[arg-type]
        assert cost.least_seconds(engine, 1, 1) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("taken", "fastest", "trials"),
    [
        ([5.0, 5.0, 5.0], 5.0, 3),
        ([5.0, 3.0, 2.0, 1.99, 1.98], 1.98, 5),  # two that are hardly faster
        ([9.0, 5.0, 6.0, 4.0, 6.0, 5.0], 4.0, 6),
    ],
)
def test_trials_go_on_while_they_get_faster(taken: list[float], fastest: float, trials: int) -> None:
    """The first passes of an engine read weights that are in no cache."""
    given = iter([*taken, 1.0])
    assert fastest_trial(lambda: next(given)) == fastest
    assert list(given) == [*taken, 1.0][trials:]


def test_the_doubt_of_a_measured_pass_grows_more_slowly_than_that_of_a_guessed_one() -> None:
    """By a sixteenth of a factor of two for each pass elsewhere, and by a quarter."""
    measured, guessed = PassCost(1, 1), PassCost(1, 1)
    measured.measure(lambda *_: 1e-3, seconds=1e9)
    for cost, first, growth in ((measured, 0.0, 1 / 16), (guessed, 3.0, 1 / 4)):
        for passes in range(3):
            factor = cost.seconds("diffusion", 1, 1) / cost.least_seconds("diffusion", 1, 1)
            assert math.log2(factor) == pytest.approx(first + growth * passes)
            cost.observe("ar", 1, 1, cost.seconds("ar", 1, 1))
