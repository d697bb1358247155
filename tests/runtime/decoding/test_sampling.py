"""Sampling: the distribution that the parameters describe, and the same draw for the same seed and position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimode import SamplingParams
from trimode.runtime.decoding.sampling import Sampler, UniformNumbers, kept_weights

LOGITS = np.array([2.0, 1.5, 0.0, -3.0], np.float32)
TOKENS = np.array([40, 7, 300, 2])
NO_PROMPT = np.empty(0, np.int64)
# Of seed 7, the second draw after the first one, at positions 0, 1, 63, 64 and 200.
NUMBERS = [0.9063653532456504, 0.9896668165446781, 0.2848746638902756, 0.40330925111751337, 0.5915461803165305]


@pytest.mark.parametrize(
    "law", [{"temperature": 0.3}, {"temperature": 1.0}, {"temperature": 2.5, "top_k": 3}, {"top_p": 0.7}], ids=str
)
def test_draws_have_the_law_of_the_parameters(law: dict[str, Any]) -> None:
    params, draws = SamplingParams(**law), 20_000
    rows = (np.broadcast_to(LOGITS, (draws, 4)), np.broadcast_to(TOKENS, (draws, 4)))
    drawn = Sampler(params, NO_PROMPT, seed=1).rows(*rows, range(draws))
    exact = kept_weights(LOGITS[None], params)[0]
    found = (drawn[:, None] == TOKENS).mean(axis=0)
    assert np.abs(found - exact / exact.sum()).sum() / 2 < 0.012


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=6, max_size=6, unique=True),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 6]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.6]),
)
def test_the_filters_exclude_what_transformers_excludes(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = np.sort(np.array(logits, np.float32))[::-1].copy()
    if top_k == 1:
        return
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    expected = LogitsProcessorList(warpers)(torch.zeros(1, 1).long(), torch.tensor(row)[None].double()).softmax(-1)[0]
    found = kept_weights(row[None], params)[0]
    np.testing.assert_allclose(found / found.sum(), expected.numpy(), atol=1e-6)


def test_repetition_penalty_is_transformers() -> None:
    params = SamplingParams(repetition_penalty=1.7)
    sampler = Sampler(params, np.array([40, 2]), seed=0)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[0, 3]]), torch.tensor(LOGITS)[None].clone())[
        0
    ].numpy()
    assert sampler.by_row(LOGITS[None], TOKENS[None], [5])(0) == TOKENS[expected.argmax()] == 7


def test_presence_and_frequency_count_what_was_emitted_since_the_row_before() -> None:
    logits, tokens = np.tile(LOGITS, (4, 1)), np.tile(TOKENS, (4, 1))
    for penalties, expected in (
        ({"presence_penalty": 1.0}, [40, 7, 40, 40]),
        ({"frequency_penalty": 0.4}, [40, 40, 7, 40]),
    ):
        sampler, drawn = Sampler(SamplingParams(**penalties), np.array([40]), seed=0), []
        token_of = sampler.by_row(logits, tokens, range(4))
        for row in range(4):
            drawn.append(token_of(row))
            sampler.note(drawn[-1:])
        assert drawn == expected


def test_greedy_is_the_first_candidate() -> None:
    sampler = Sampler(SamplingParams(), NO_PROMPT, seed=0)
    assert sampler.rows(LOGITS[None], TOKENS[None], [3]).tolist() == [40]


@pytest.mark.parametrize(("number", "token"), [(0.0, 40), (np.nextafter(1.0, 0.0), 2)])
def test_the_ends_of_the_unit_interval(monkeypatch: pytest.MonkeyPatch, number: float, token: int) -> None:
    monkeypatch.setattr(UniformNumbers, "at", lambda *_: np.array([number]))
    assert Sampler(SamplingParams(temperature=1.0), NO_PROMPT, 0).rows(LOGITS[None], TOKENS[None], [0]) == [token]


def test_numbers_depend_on_seed_position_and_draw_and_not_on_the_order_of_asking() -> None:
    keys = [(seed, position, draw) for seed in (0, 1, 2**64 - 1) for position in range(150) for draw in range(3)]
    numbers = [UniformNumbers(seed).at([position], draw)[0] for seed, position, draw in keys]
    assert len(set(numbers)) == len(keys)
    assert all(0 <= number < 1 for number in numbers)
    together = UniformNumbers(1)
    for start in range(0, 150, 7):
        for draw in (0, 2):
            expected = [numbers[keys.index((1, position, draw))] for position in range(start, min(start + 7, 150))]
            assert together.at(range(start, min(start + 7, 150)), draw).tolist() == expected


def test_a_seed_gives_the_same_numbers_in_every_version() -> None:
    """An answer can be continued by another process, and its seed reproduces it later."""
    found = UniformNumbers(7).at([0, 1, 63, 64, 200], draw=2)
    np.testing.assert_allclose(found, NUMBERS, rtol=1e-12)
    assert UniformNumbers(7).at([0])[0] != found[0]
