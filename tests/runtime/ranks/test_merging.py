"""Candidates of parts of a vocabulary, merged, are those of the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support.token_masks import packed
from trimode.runtime.executor import Candidates
from trimode.runtime.ranks.merging import local_ids, local_mask, merged


def best(logits: NDArray[np.float32], top_k: int, asked: NDArray[np.int64]) -> Candidates:
    """Of logits [B, R, V]: best first, of equal ones the lowest id."""
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    total = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)).astype(np.float32)
    return Candidates(np.take_along_axis(logits, order, -1), order, total, np.take_along_axis(logits, asked, axis=-1))


@given(ranks=st.sampled_from([2, 3, 4]), tokens=st.integers(1, 9), top_k=st.integers(1, 12), seed=st.integers(0, 1000))
def test_the_best_of_all_parts_are_the_best_of_the_whole(ranks: int, tokens: int, top_k: int, seed: int) -> None:
    """Logits are small whole numbers, so that many are equal."""
    rng, vocabulary = np.random.default_rng(seed), ranks * tokens
    top_k = min(top_k, vocabulary)
    logits = rng.integers(-2, 3, (2, 3, vocabulary)).astype(np.float32)
    asked = rng.integers(0, vocabulary, (2, 3, 4))
    parts = []
    for rank in range(ranks):
        part = slice(rank * tokens, (rank + 1) * tokens)
        parts.append(best(logits[..., part], min(top_k, tokens), local_ids(asked, part)))
    found, expected = merged(parts, top_k, tokens, asked), best(logits, top_k, asked)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.asked_logits, expected.asked_logits)
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=1e-6)


def test_a_part_without_a_legal_token_adds_nothing() -> None:
    never, ids = np.full((1, 1, 1), -1e30, np.float32), np.zeros((1, 1, 1), np.int64)
    one = Candidates(np.full((1, 1, 1), 3, np.float32), ids, np.full((1, 1), 3.5, np.float32))
    none = Candidates(never, ids, np.full((1, 1), -1e30, np.float32))
    found = merged([none, one], 1, 10, None)
    assert (found.tokens.item(), found.logits.item(), found.log_sum_exp.item()) == (10, 3.0, 3.5)
    assert merged([none, none], 1, 10, None).log_sum_exp.item() == np.float32(-1e30)


@pytest.mark.parametrize("tokens", [slice(0, 32), slice(32, 64), slice(5, 10), slice(40, 77)])
def test_a_rank_gets_the_bits_of_its_tokens(tokens: slice) -> None:
    legal = np.random.default_rng(0).random((2, 3, 77)) < 0.5
    np.testing.assert_array_equal(local_mask(packed(legal), tokens), packed(legal[..., tokens]))
