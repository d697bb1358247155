"""Constrained draws follow the exact law: AR's best legal candidates, whatever the draft and the reported tokens."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.exact_law import total_variation
from tests.support.ruled_language import SETTINGS, constrained_law, drawn
from trimode import SamplingParams

MODES: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 4},
    {"mode": "linear_spec", "block_length": 4, "tree_width": 9},
)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_constrained_draws_follow_the_law_of_masked_ar(setting: dict[str, Any], mode: dict[str, Any]) -> None:
    prompt = (2, 3)
    params = SamplingParams(max_tokens=3, **mode, **setting)
    exact = constrained_law(prompt, 3, params)
    assert sum(exact.values()) == pytest.approx(1)
    assert total_variation(drawn(prompt, params, range(1000)), exact).is_chance
