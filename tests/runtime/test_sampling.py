"""Drawing a token: the candidates' distribution, the same for the same seed and position."""

from __future__ import annotations

import numpy as np
import pytest

from trimode.runtime.sampling import choose, uniform

LOGITS = np.array([2.0, 1.5, 0.0, -3.0], np.float32)
TOKENS = np.array([40, 7, 300, 2])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_have_the_softmax_distribution(temperature: float) -> None:
    draws = 20_000
    rows = (np.broadcast_to(LOGITS, (draws, 4)), np.broadcast_to(TOKENS, (draws, 4)))
    drawn = choose(*rows, temperature, [uniform(1, position) for position in range(draws)])
    exact = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    found = (drawn[:, None] == TOKENS).mean(axis=0)
    assert np.abs(found - exact).sum() / 2 < 0.012


def test_greedy_is_the_first_candidate() -> None:
    assert choose(LOGITS[None], TOKENS[None], 0.0, []).tolist() == [40]


@pytest.mark.parametrize(("number", "token"), [(0.0, 40), (np.nextafter(1.0, 0.0), 2)])
def test_the_ends_of_the_unit_interval(number: float, token: int) -> None:
    assert choose(LOGITS[None], TOKENS[None], 1.0, [number]).tolist() == [token]


def test_numbers_depend_on_seed_position_and_draw() -> None:
    keys = [(seed, position, draw) for seed in (0, 1, 2**64 - 1) for position in range(20) for draw in range(3)]
    numbers = [uniform(*key) for key in keys]
    assert numbers == [uniform(*key) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert all(0 <= number < 1 for number in numbers)
