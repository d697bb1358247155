"""Mode auto: long blocks where tokens are free and drafts lucky, short ones where either fails."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.runtime import SamplingParams
from trimode.runtime.acceptance import Acceptance
from trimode.runtime.auto_block import CHOICES, choose_block_length
from trimode.runtime.decoding import Sequence
from trimode.runtime.ending import Ending
from trimode.runtime.pass_cost import EngineName, PassCost


def sequence(luck: float, mode: str = "auto", block_length: int | None = None, max_tokens: int = 100) -> Sequence:
    params = SamplingParams(mode=mode, block_length=block_length, max_tokens=max_tokens)  # type: ignore[arg-type]
    acceptance = Acceptance()
    acceptance.rates = np.full_like(acceptance.rates, luck)
    return Sequence([5], params, Ending(params, frozenset()), acceptance, mask_id=0, prefill_step=8, seed=0)


def machine(free_tokens: float, batches: int = 16) -> PassCost:
    """A pass costs 1 ms up to so many tokens, and in proportion beyond."""
    cost = PassCost(batches, 32)

    def seconds(_: EngineName, batch: int, step: int) -> float:
        return 1e-3 * max(1.0, batch * step / free_tokens)

    cost.measure(seconds, seconds=1e9)
    return cost


@pytest.mark.parametrize(
    ("luck", "free_tokens", "requests", "block"),
    [
        (0.99, 1000, 1, 32),  # tokens cost nothing and all are accepted
        (0.0, 1000, 1, 1),  # a draft pass that yields nothing
        (0.9, 1, 1, 1),  # every token costs in full: twice, and some are rejected
        (0.9, 16, 1, 16),
        (0.9, 16, 16, 1),  # the same machine under load
        (0.4, 1000, 1, 1),  # 1.67 tokens for two passes
    ],
)
def test_what_pays(luck: float, free_tokens: float, requests: int, block: int) -> None:
    deciding = [sequence(luck) for _ in range(requests)]
    assert choose_block_length(deciding, [], machine(free_tokens)) == block


@given(
    lucks=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    free_tokens=st.floats(1, 200),
    longest=st.integers(1, 40),
)
def test_it_is_the_best_of_all_choices(lucks: list[float], free_tokens: float, longest: int) -> None:
    """Against the formula, written out."""
    deciding = [sequence(luck, block_length=longest) for luck in lucks]
    cost = machine(free_tokens)

    def rate(block: int) -> float:
        block = min(block, longest)
        tokens = sum(1 + sum(luck**place for place in range(1, min(block, 32))) for luck in lucks)
        passes = ["ar"] if block == 1 else ["ar", "diffusion"]
        return tokens / sum(cost.seconds(engine, len(lucks), block) for engine in passes)  # type: ignore[arg-type]

    chosen = choose_block_length(deciding, [], cost)
    assert rate(chosen) >= max(rate(block) for block in CHOICES) * (1 - 1e-9)


def test_beside_a_long_block_a_short_one_saves_nothing() -> None:
    """A fixed request's draft pass runs anyway, and a longer step than ours: ours rides along."""
    cost, doubtful = machine(1000), [sequence(0.45)]
    assert choose_block_length(doubtful, [], cost) == 1
    assert choose_block_length(doubtful, [sequence(0.9, "linear_spec", 32)], cost) > 1


def test_history_decides_and_is_forgotten() -> None:
    shared = Acceptance()
    own = Acceptance(begins_with=shared)
    begins = own.expected(16)
    for _ in range(20):
        own.observe(accepted=1, tested=2)
    assert own.expected(16) == pytest.approx(2, abs=0.1)
    assert own.expected(16) < Acceptance(begins_with=shared).expected(16) < begins
    for _ in range(2000):
        own.forget()
    assert own.expected(16) == pytest.approx(begins, rel=0.1)


def test_a_text_that_ends_says_nothing_of_the_drafts_behind_its_end() -> None:
    acceptance = Acceptance()
    before = acceptance.rates.copy()
    acceptance.observe(accepted=3, tested=3)
    assert (acceptance.rates[:3] > before[:3]).all()
    assert (acceptance.rates[3:] == before[3:]).all()
