"""Calibration: the expected acceptance of a draft follows what happened to drafts of like probability."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.runtime.decoding.confidence import Confidence


def rate(confidence: Confidence, probability: float) -> float:
    return float(confidence.rates(np.array([[probability]]))[0, 0])


def test_before_anything_is_known_a_draft_is_trusted() -> None:
    for probability in (0.005, 0.06, 0.3, 0.6, 0.93, 0.9995):
        assert rate(Confidence(), probability) == pytest.approx(probability, abs=0.08)


@pytest.mark.parametrize("true", [lambda p: p**3, lambda p: p**0.25, lambda _: 0.7], ids=["over", "under", "flat"])
def test_a_drafter_that_is_too_sure_or_too_unsure_is_calibrated(true: object) -> None:
    """The error of the calibrated rates is a fraction of that of the draft's own probabilities."""
    rng, confidence = np.random.default_rng(0), Confidence()
    for _ in range(4000):
        probability = float(rng.random())
        confidence.observe([probability], [bool(rng.random() < true(probability))])  # type: ignore[operator]
    judged = np.linspace(0.02, 0.98, 49)
    expected = np.array([true(probability) for probability in judged])  # type: ignore[operator]
    found = confidence.rates(judged[:, None])[:, 0]
    assert np.abs(found - expected).mean() < 0.5 * np.abs(judged - expected).mean()
    assert np.abs(found - expected).mean() < 0.1


def test_a_new_request_starts_from_what_all_requests_learnt() -> None:
    shared = Confidence()
    for _ in range(400):
        Confidence(shared).observe([0.9], [False])
    assert rate(Confidence(shared), 0.9) < 0.1
    own = Confidence(shared)
    own.observe([0.9] * 50, [True] * 50)
    assert rate(own, 0.9) > 0.8 > rate(Confidence(shared), 0.9)


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(0, 100))
def test_rates_fall_along_a_place_whatever_was_learnt(drafts: list[list[float]], seed: int) -> None:
    """The search for the likeliest nodes relies on it."""
    rng, confidence = np.random.default_rng(seed), Confidence()
    seen = rng.random(200)
    confidence.observe(seen.tolist(), (rng.random(200) < 1 - seen).tolist())
    rates = confidence.rates(np.array([sorted(each, reverse=True) for each in drafts]))
    assert ((rates > 0) & (rates < 1)).all()
    assert (np.diff(rates, axis=1) <= 0).all()
