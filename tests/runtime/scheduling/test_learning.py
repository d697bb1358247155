"""Mode ``auto`` learns how many drafts are accepted: its speed on a simulated machine, with random acceptance."""

from __future__ import annotations

import random
import statistics

import pytest

from trimode import SamplingParams
from trimode.runtime.decoding.acceptance_rates import Acceptance, SharedAcceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.scheduling.auto_block import CHOICES, BlockChooser, Opening
from trimode.runtime.scheduling.pass_cost import EngineName, PassCost

TOKENS, ANSWERS, LEARNING_ANSWERS = 96, 100, 5
# Milliseconds of a pass by tokens, of networks with 250 million and 3 billion parameters on two cores (docs/cpu.md).
# Single tokens are cheap there, so drafts pay off only if most of them are accepted.
SHAPES = {
    "250m": {1: 13.5, 2: 13.0, 4: 17.8, 8: 26.3, 16: 45.4, 32: 78.5},
    "3b": {1: 162.0, 2: 169.0, 4: 224.0, 8: 443.0, 16: 555.0, 32: 1020.0},
}


class Decoding:
    """Answers one request after another; the draft of every place is accepted with the same probability.

    delays: share of passes that take 2 to 5 times as long, as on a machine with other work.
    """

    def __init__(self, shape: str, probability: float, delays: float = 0.0) -> None:
        self._milliseconds = SHAPES[shape]
        self._random = random.Random(0)  # noqa: S311 - not for secrets
        self.probability, self._delays = probability, delays
        self.cost = PassCost(1, max(CHOICES))
        self.cost.measure(self.seconds, seconds=1e9, clock=lambda: 0.0)
        self._chooser, self._shared = BlockChooser(self.cost), SharedAcceptance()

    def seconds(self, _: EngineName, _batch: int, step: int) -> float:
        """Of a pass of the next power of two of tokens."""
        return 1e-3 * self._milliseconds[1 << (step - 1).bit_length()]

    def answer(self, block_length: int | None = None) -> float:
        """Seconds per token of one answer, with a fixed block length or by ``auto``."""
        params = SamplingParams(mode="auto", max_tokens=TOKENS)
        acceptance = Acceptance(self._shared)
        sequence = Sequence(
            [5], params, Ending(params, frozenset()), acceptance, context=1000, mask_id=0, prefill_step=8, seed=0
        )
        seconds = 0.0
        while sequence.ending.finish_reason is None:
            block = min(block_length or self._chosen(acceptance, sequence), sequence.longest_block)
            engines: tuple[EngineName, ...] = ("ar",) if block == 1 else ("diffusion", "ar")
            for engine in engines:
                taken = self.seconds(engine, 1, block) * self._random.lognormvariate(0, 0.1)
                if self._random.random() < self._delays:
                    taken *= self._random.uniform(2, 5)
                seconds += taken
                if block_length is None:
                    self.cost.observe(engine, 1, block, taken)
            accepted = 0
            while accepted < block - 1 and self._random.random() < self.probability:
                accepted += 1
            if block_length is None and block > 1:
                acceptance.observe(accepted, min(accepted + 1, block - 1), ended=False)
            for _ in range(accepted + 1):
                sequence.ending.take(7)
        return seconds / TOKENS

    def _chosen(self, acceptance: Acceptance, sequence: Sequence) -> int:
        kept = self._chooser.kept(1)
        if kept is not None:
            return kept.block
        plan = self._chooser.choose([Opening(sequence, [])], [])
        if plan.block == 1:
            acceptance.forget(plan.cycles)
        return plan.block


def ratio_to_the_best(decoding: Decoding) -> float:
    """The speed of ``auto``, once it has learnt, divided by that of the best fixed block length."""
    for _ in range(LEARNING_ANSWERS):
        decoding.answer()
    auto = statistics.mean(decoding.answer() for _ in range(ANSWERS))
    return min(statistics.mean(decoding.answer(block) for _ in range(ANSWERS)) for block in CHOICES) / auto


# They give 2, 4, 6 and 8 tokens per cycle with long blocks.
PROBABILITIES = (0.5, 0.75, 0.837, 0.885)


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_auto_is_nearly_as_fast_as_the_best_fixed_block_length(shape: str, probability: float) -> None:
    assert ratio_to_the_best(Decoding(shape, probability)) >= 0.95


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_delays_of_single_passes_do_not_mislead_auto(shape: str, probability: float) -> None:
    assert ratio_to_the_best(Decoding(shape, probability, delays=0.05)) >= 0.93


def test_auto_drafts_again_when_drafts_become_good() -> None:
    """After 3,000 tokens of which drafts were mostly rejected, a few answers suffice."""
    decoding = Decoding("250m", 0.5)
    for _ in range(30):
        decoding.answer()
    decoding.probability = 0.885
    for _ in range(LEARNING_ANSWERS):
        decoding.answer()
    auto = statistics.mean(decoding.answer() for _ in range(ANSWERS))
    assert decoding.answer(1) / auto >= 1.15
