"""The kernels from logits to candidates, interpreted, against their references and against a plain sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.kernel_cases import DTYPES, operator_inputs
from tests.support.kernel_functions import run
from trimode.plugins.operators import MergeCandidates, TopCandidates
from trimode.plugins.operators.candidates import MOST_CANDIDATES, NEVER, TILE
from trimode.plugins.reference import candidates

MASK_TOKEN = 9


def best_of(
    logits: Tensor, token_mask: Tensor | None = None, *, top_k: int, mask_token: int = MASK_TOKEN, tactic: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """top_logits, top_tokens and log_sum_exp by both kernels. The tiles' results are compared with the reference."""
    masked = token_mask is not None
    operator, inputs = TopCandidates(masked=masked), {"logits": logits}
    if token_mask is not None:
        inputs["token_mask"] = token_mask
    attributes = {"top_k": top_k, "mask_token": mask_token}
    tiles, _ = run(operator, inputs, tactic=TopCandidates.TACTICS[tactic - 1], **attributes)
    for found, wanted in zip(tiles[:2], candidates.top_candidates(**inputs, **attributes)[:2], strict=True):
        assert torch.equal(found, wanted)
    torch.testing.assert_close(tiles[2], candidates.top_candidates(**inputs, **attributes)[2], rtol=1e-6, atol=1e-5)
    merged, _ = run(
        MergeCandidates(),
        dict(zip(("tile_logits", "tile_tokens", "tile_sums"), tiles, strict=True)),
        tactic=MergeCandidates.TACTICS[tactic - 1],
        top_k=top_k,
    )
    for found, wanted in zip(merged[:2], candidates.merge_candidates(*tiles, top_k=top_k)[:2], strict=True):
        assert torch.equal(found, wanted)
    top_logits, top_tokens, log_sum_exp = merged
    return top_logits, top_tokens, log_sum_exp


def plain(logits: Tensor, legal: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by one stable sort of the whole row."""
    possible = logits.float().masked_fill(~legal, NEVER)
    top_logits, top_tokens = possible.sort(dim=-1, descending=True, stable=True)
    sums = possible.masked_fill(~legal, -torch.inf).logsumexp(-1).clamp(min=NEVER)
    return top_logits[..., :top_k], top_tokens[..., :top_k], sums


def check(found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=1e-5)


def legal_tokens(token_mask: Tensor, vocabulary: int) -> Tensor:
    """Unpacked by numpy's own order of bits, not by shifts."""
    bytes_ = torch.from_numpy(token_mask.numpy().view("uint8"))
    bits = torch.stack([(bytes_ & 1 << bit) != 0 for bit in range(8)], -1).flatten(2)[..., :vocabulary].clone()
    bits[..., MASK_TOKEN] = False
    return bits


@given(
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    top_k=st.sampled_from([1, 2, 5, 20]),
    vocabulary=st.sampled_from([40, TILE - 1, TILE, TILE + 1, TILE + 33, 2 * TILE + 31]),
    tactic=st.sampled_from([1, 2]),
    ties=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_candidates_are_those_of_a_sort(
    dtype: torch.dtype, masked: bool, top_k: int, vocabulary: int, tactic: int, ties: bool, seed: int
) -> None:
    """Logits of tokens that are not legal are NaN. ties: logits are a few integers."""
    name = "TopCandidatesMasked" if masked else "TopCandidates"
    inputs, _ = operator_inputs(name, dtype, step=4, vocabulary=vocabulary, seed=seed)
    if ties:
        inputs["logits"] = inputs["logits"].round()
    legal = torch.ones(inputs["logits"].shape, dtype=torch.bool)
    legal[..., MASK_TOKEN] = False
    if masked:
        legal = legal_tokens(inputs["token_mask"], vocabulary)
    check(best_of(**inputs, top_k=top_k, tactic=tactic), plain(inputs["logits"], legal, top_k))


def test_the_most_candidates_of_three_tiles() -> None:
    """The last tile has fewer tokens than candidates."""
    logits = torch.randn(1, 1, 2 * TILE + 7, generator=torch.Generator().manual_seed(0))
    legal = (torch.arange(2 * TILE + 7) != MASK_TOKEN).expand(1, 1, -1)
    check(best_of(logits, top_k=MOST_CANDIDATES), plain(logits, legal, MOST_CANDIDATES))


def test_equal_logits_are_ordered_by_token_across_tiles() -> None:
    logits = torch.zeros(1, 1, 2 * TILE + 5)
    for token in (2 * TILE + 4, TILE + 3, TILE, 17, 2 * TILE):
        logits[..., token] = 1.5
    logits[..., 3] = -0.0
    logits[..., 4] = 0.0
    _, tokens, _ = best_of(logits, top_k=10)
    assert tokens.flatten().tolist() == [17, TILE, TILE + 3, 2 * TILE, 2 * TILE + 4, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("top_k", [1, 4])
def test_the_mask_token_is_never_a_candidate(top_k: int) -> None:
    logits = torch.randn(1, 2, TILE, generator=torch.Generator().manual_seed(0))
    logits[..., MASK_TOKEN] = 100
    _, tokens, log_sum_exp = best_of(logits, top_k=top_k)
    assert MASK_TOKEN not in tokens
    assert (log_sum_exp < 20).all()


def test_a_row_without_a_legal_token_has_the_lowest_values() -> None:
    logits = torch.full((1, 2, TILE + 40), float("nan"))
    logits[0, 1] = 1.0
    words = torch.zeros(1, 2, TILE // 32 + 2, dtype=torch.int32)
    words[0, 1, 1] = -(2**31)  # token 63
    top_logits, tokens, log_sum_exp = best_of(logits, words, top_k=3)
    assert torch.equal(top_logits[0, 0], torch.full((3,), NEVER))
    assert tokens[0].tolist() == [[0, 1, 2], [63, 0, 1]]
    assert log_sum_exp[0].tolist() == [pytest.approx(NEVER), 1.0]
    assert top_logits[0, 1].tolist() == [1.0, pytest.approx(NEVER), pytest.approx(NEVER)]


def test_very_high_and_very_low_logits_do_not_overflow() -> None:
    for logit in (-6e4, 6e4):
        logits = torch.full((1, 1, 100), logit)
        top_logits, _, log_sum_exp = best_of(logits, top_k=2)
        assert torch.equal(top_logits, torch.full((1, 1, 2), logit))
        torch.testing.assert_close(log_sum_exp, torch.full((1, 1), 99.0).log() + logit)
