"""Denoising policies against worked examples and against the reference's quotas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode import SamplingParams
from trimode.model.reference.decoding import even_quotas
from trimode.runtime.decoding.denoising import settled

CONFIDENCE = np.array([0.5, 0.95, 0.2, 0.9, 0.7])


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, [1, 3]),  # at least 0.9
        ({"threshold": 0.9}, [1, 3]),
        ({"threshold": 1.0}, [1]),
        ({"threshold": 0.0}, [0, 1, 2, 3, 4]),
        ({"denoising": "top_n", "denoising_top_n": 3}, [1, 3, 4]),
        # 1 - 0.5 / 2 = 0.75, 1 - 0.5 / 3 = 0.83, 1 - 0.5 / 4 = 0.875: the third falls short.
        ({"denoising": "factor", "threshold": 0.5}, [1, 3]),
        ({"denoising": "factor", "threshold": 0.3}, [1, 3]),  # 1 - 0.3 / 3 = 0.9 is reached exactly
        ({"denoising": "factor", "threshold": 0.0}, [1]),
        # 0.95, 0.855, 0.5985, 0.299
        ({"denoising": "product", "threshold": 0.59}, [1, 3, 4]),
        ({"denoising": "product", "threshold": 0.95 * 0.9}, [1, 3]),
        ({"denoising": "product", "threshold": 0.0}, [0, 1, 2, 3, 4]),
        ({"denoising": "quota", "denoising_steps": 2}, [1, 3, 4]),
        ({"denoising": "quota", "block_length": 3}, [1, 3]),  # a pass for each token of the block
    ],
    ids=str,
)
def test_by_hand(options: dict[str, Any], places: list[int]) -> None:
    params = SamplingParams(mode="diffusion", **options)
    assert np.flatnonzero(settled(CONFIDENCE, params, masks=5, done=0)).tolist() == places


@given(masks=st.integers(1, 40), steps=st.integers(1, 40))
def test_quotas_are_the_references(masks: int, steps: int) -> None:
    params = SamplingParams(mode="diffusion", denoising="quota", denoising_steps=steps)
    left, taken = masks, []
    while left:
        confidence = np.random.default_rng(left).random(left)
        taken.append(int(settled(confidence, params, masks, len(taken)).sum()))
        left -= taken[-1]
    expected = even_quotas(masks, steps)
    assert taken == [next(expected) for _ in taken]
