"""Mode ``auto`` after a start that measured passes wrongly, on a simulated machine whose seconds are known."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest

from tests.support.exact_law import Bench
from trimode import SamplingParams
from trimode.runtime.decoding.acceptance_rates import Acceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.scheduling.auto_block import CHOICES, BlockChooser, Opening
from trimode.runtime.scheduling.pass_cost import EngineName, PassCost

CYCLES = 200  # in which it recovers
# Each takes longer in one of its cases.
CYCLES_FROM_A_FAST_START, CYCLES_FROM_RANDOM_ERRORS = 1500, 500
JUDGED = 1000  # the cycles after those
# Acceptance rate of drafts, tokens that a pass computes in its least time, and sequences at once.
LOADS = [(0.99, 1000, 1), (0.9, 16, 1), (0.9, 16, 16), (0.4, 1000, 1), (0.8, 64, 4)]


def sequence(acceptance_rate: float) -> Sequence:
    params = SamplingParams(mode="auto", max_tokens=100)
    acceptance = Acceptance()
    acceptance.rates[:], acceptance.end_rate = [acceptance_rate] * len(acceptance.rates), 0.0
    acceptance.tree_gains[:] = [0.0] * len(CHOICES)
    return Sequence(
        [5], params, Ending(params, frozenset()), acceptance, context=1000, mask_id=0, prefill_step=8, seed=0
    )


class Simulation:
    """Sequences that decode for ever. A pass takes 1 ms up to ``free_tokens`` tokens, and in proportion beyond."""

    def __init__(self, rate: float, free_tokens: float, requests: int) -> None:
        self.free_tokens = free_tokens
        self.cost = PassCost(16, 32)
        self._requests = [sequence(rate) for _ in range(requests)]
        self._chooser = BlockChooser(self.cost)

    def seconds(self, _: EngineName, batch: int, step: int) -> float:
        return 1e-3 * max(1.0, batch * step / self.free_tokens)

    def cycle(self, block: int) -> tuple[float, float]:
        """Tokens and seconds."""
        passes: tuple[EngineName, ...] = ("ar",) if block == 1 else ("diffusion", "ar")
        tokens = sum(request.acceptance.yields()[block - 1] for request in self._requests)
        return tokens, sum(self.seconds(engine, len(self._requests), block) for engine in passes)

    def run(self, cycles: int) -> float:
        """Tokens a second."""
        tokens = seconds = 0.0
        for _ in range(cycles):
            plan = self._chooser.kept(len(self._requests))
            block = (plan or self._chooser.choose([Opening(request, []) for request in self._requests], [])).block
            for engine in ("ar",) if block == 1 else ("diffusion", "ar"):
                taken = self.seconds(engine, len(self._requests), block)
                self.cost.observe(engine, len(self._requests), block, taken)
            more = self.cycle(block)
            tokens, seconds = tokens + more[0], seconds + more[1]
        return tokens / seconds

    def is_near_the_best(self) -> bool:
        """0.9 of the speed of the best block length, trials included."""
        best = max(tokens / seconds for tokens, seconds in map(self.cycle, CHOICES))
        return self.run(JUDGED) >= 0.9 * best


@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize("start", ["right", "nothing measured", "no time", "proportional", "inverse", "slow", "fast"])
def test_auto_recovers_from_any_start(start: str, load: tuple[float, float, int]) -> None:
    simulation = Simulation(*load)
    measured = {
        "right": simulation.seconds,
        "no time": simulation.seconds,
        "proportional": lambda _engine, batch, step: 1e-3 * batch * step,
        "inverse": lambda _engine, batch, step: 1e-1 / (batch * step),
        "slow": lambda *a_pass: 30 * simulation.seconds(*a_pass),
        "fast": lambda *a_pass: simulation.seconds(*a_pass) / 30,
    }
    if start in measured:
        simulation.cost.measure(measured[start], seconds=0.0 if start == "no time" else 1e9, clock=lambda: 0.0)
    simulation.run(CYCLES_FROM_A_FAST_START if start == "fast" else CYCLES)
    assert simulation.is_near_the_best()


@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_auto_recovers_from_a_start_with_random_errors(seed: int, load: tuple[float, float, int]) -> None:
    """Each cell is wrong by up to a factor of 30, either way."""
    simulation, noise = Simulation(*load), random.Random(seed)  # noqa: S311 - not for secrets

    @cache
    def measured(engine: EngineName, batch: int, step: int) -> float:
        return simulation.seconds(engine, batch, step) * math.exp(noise.uniform(-math.log(30), math.log(30)))

    simulation.cost.measure(measured, seconds=1e9)
    simulation.run(CYCLES_FROM_RANDOM_ERRORS)
    assert simulation.is_near_the_best()


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_auto_follows_a_machine_that_changes(load: tuple[float, float, int]) -> None:
    """Other work makes long passes slow, then it ends: some seconds later the choice is right again."""
    simulation = Simulation(*load)
    simulation.cost.measure(simulation.seconds, seconds=1e9)
    quiet = simulation.free_tokens
    for free_tokens in (quiet, quiet / 8, quiet):
        simulation.free_tokens = free_tokens
        simulation.run(25 * CYCLES)  # a slow trial is made up for before the next one
        assert simulation.is_near_the_best()


def test_the_scheduler_recovers_and_its_tokens_stay_the_same() -> None:
    """The whole scheduler, on an executor that takes its time from a clock of its own, after a start at which every
    draft seemed to take 30 times as long as it does.
    """
    texts, drafts = [], []
    for first_guess in (1e-3, 30e-3):
        now = [0.0]
        bench = Bench(max_batch=1, capacity=2048, end=False, prefix_cache=False, clock=lambda now=now: now[0])
        run = bench.executor.run

        def timed(step: object, run: object = run, now: list[float] = now) -> object:
            now[0] += 1e-3
            return run(step)  # type: ignore[operator]

        bench.executor.run = timed  # type: ignore[method-assign, assignment]
        bench.cost.measure(
            lambda engine, _batch, _step, slow=first_guess: slow if engine == "diffusion" else 1e-3, seconds=1e9
        )
        found: list[int] = []
        params = SamplingParams(mode="auto", max_tokens=2000)
        request = bench.add((2, 3), params, lambda update, found=found: found.extend(update.token_ids))
        bench.run()
        texts.append(found)
        drafts.append(request.sequence.counts.draft / request.sequence.counts.commit)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2000
    assert min(drafts) > 0.8
