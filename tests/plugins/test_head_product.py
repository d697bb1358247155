"""The kernels of a head and of the merge behind it, interpreted, against their references and against a plain sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scripts.gpu.kernel_checks import distance
from scripts.gpu.kernel_launch import node_of
from tests.support.kernel_cases import DTYPES, HEAD_MASK_TOKEN, head_inputs
from tests.support.kernel_functions import TOLERANCES, reference_of, run
from trimode.plugins.operators import OPERATORS, DenseHead, Head, Int4Head, MergeCandidates, Tactic
from trimode.plugins.operators.candidates import MOST_CANDIDATES, NEVER, TILE
from trimode.plugins.reference import candidates

HEADS = [operator for operator in OPERATORS.values() if isinstance(operator, Head)]
TILE_RESULTS = ("tile_logits", "tile_tokens", "tile_sums", "logits")
Best = tuple[Tensor, Tensor, Tensor]


def results_of(
    operator: Head, inputs: dict[str, Tensor], tactic: Tactic | None = None, **attributes: int
) -> tuple[Tensor, ...]:
    """The head's outputs, compared with the reference: all exactly but the sums."""
    found, _ = run(operator, inputs, tactic=tactic, **attributes)
    expected = reference_of(operator.name, torch.float32)(**inputs, **attributes)
    for output, result, wanted in zip(operator.outputs, found, expected, strict=True):
        if output.name == "tile_sums":
            torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-5)
        else:
            assert torch.equal(result, wanted), output.name
    return found


def merged(tiles: tuple[Tensor, ...], top_k: int, merge_tactic: int = 1) -> Best:
    inputs = dict(zip(TILE_RESULTS, tiles[:4], strict=True))
    found, _ = run(MergeCandidates(), inputs, tactic=MergeCandidates.TACTICS[merge_tactic - 1], top_k=top_k)
    expected = candidates.merge_candidates(*tiles[:4], top_k=top_k)
    assert all(torch.equal(result, wanted) for result, wanted in zip(found[:2], expected[:2], strict=True))
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=1e-5)
    top_logits, top_tokens, log_sum_exp = found
    return top_logits, top_tokens, log_sum_exp


def best_of(logits: Tensor, token_mask: Tensor | None = None, *, top_k: int) -> Best:
    """Of any logits [1, L, V]: they are the weights, and x is the identity."""
    inputs = {"x": torch.eye(logits.shape[1])[None], "weight": logits[0].contiguous()}
    if token_mask is not None:
        inputs["token_mask"] = token_mask
    inputs["asked_ids"] = torch.empty(1, logits.shape[1], 0, dtype=torch.long)
    operator = DenseHead(masked=token_mask is not None)
    return merged(results_of(operator, inputs, top_k=top_k, mask_token=HEAD_MASK_TOKEN), top_k)


def plain(logits: Tensor, legal: Tensor, top_k: int) -> Best:
    """The same by one stable sort of the whole row."""
    possible = logits.masked_fill(~legal, NEVER)
    top_logits, top_tokens = possible.sort(dim=-1, descending=True, stable=True)
    sums = possible.masked_fill(~legal, -torch.inf).logsumexp(-1).clamp(min=NEVER)
    return top_logits[..., :top_k], top_tokens[..., :top_k], sums


def check(found: Best, expected: Best) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=1e-5)


def legal_tokens(shape: tuple[int, ...], token_mask: Tensor | None) -> Tensor:
    """Unpacked by numpy's own order of bits, not by shifts."""
    bits = torch.ones(shape, dtype=torch.bool)
    if token_mask is not None:
        bytes_ = torch.from_numpy(token_mask.numpy().view("uint8"))
        bits = torch.stack([(bytes_ & 1 << bit) != 0 for bit in range(8)], -1).flatten(2)[..., : shape[-1]].clone()
    bits[..., HEAD_MASK_TOKEN] = False
    return bits


def logits_of(operator: Head, inputs: dict[str, Tensor]) -> Tensor:
    """All logits: those of the ids that are asked for."""
    batch, rows, _ = inputs["x"].shape
    columns = inputs["scale" if isinstance(operator, Int4Head) else "weight"].shape[1]
    everything = {**inputs, "asked_ids": torch.arange(columns).expand(batch, rows, -1).contiguous()}
    logits = reference_of(operator.name, torch.float32)(**everything, top_k=1, mask_token=HEAD_MASK_TOKEN)[-1]
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("operator", HEADS, ids=lambda operator: operator.name)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    rows=st.integers(1, 20),
    vocabulary=st.sampled_from([40, TILE - 1, TILE, TILE + 1, 3 * TILE, 4 * TILE + 33, 6 * TILE + 31]),
    groups=st.integers(1, 4),
    group=st.sampled_from([16, 32, 48, 64]),
    top_k=st.sampled_from([1, 1, 2, 7]),
    asked=st.integers(0, 5),
    choice=st.integers(0, 99),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=7, deadline=None, derandomize=True)
def test_a_head_gives_the_candidates_of_a_sort(
    operator: Head, dtype: torch.dtype, batch: int, rows: int, vocabulary: int, top_k: int, choice: int, **sizes: Any
) -> None:
    """Many logits are equal. Asked logits are those of illegal tokens too."""
    inputs, attributes = head_inputs(operator, dtype, batch, rows, vocabulary, top_k=top_k, **sizes)
    tactics = list(operator.tactics(node_of(inputs, attributes)).values())
    found = results_of(operator, inputs, tactics[choice % len(tactics)], **attributes)
    logits = logits_of(operator, inputs)
    assert torch.equal(found[-1], logits.gather(2, inputs["asked_ids"]))
    legal = legal_tokens(tuple(logits.shape), inputs.get("token_mask"))
    check(merged(found, top_k, 1 + choice % 2), plain(logits, legal, top_k))


@pytest.mark.parametrize("operator", HEADS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_any_size_are_those_of_the_reference(operator: Head, dtype: torch.dtype) -> None:
    inputs, attributes = head_inputs(operator, dtype, 2, 9, 3 * TILE + 5, group=128)
    random = torch.Generator().manual_seed(1)
    for name in inputs.keys() & {"x", "weight", "scale", "squares"}:
        inputs[name] = (torch.rand(inputs[name].shape, generator=random) + 0.1).to(inputs[name].dtype)
    expected = reference_of(operator.name, dtype)(**inputs, **attributes)
    for tactic in operator.tactics(node_of(inputs, attributes)).values():
        found, _ = run(operator, inputs, tactic=tactic, **attributes)
        for at in (0, 2, 3, 4):
            assert distance(found[at], expected[at]) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("operator", [Int4Head(normed=True), DenseHead()], ids=lambda operator: operator.name)
def test_a_rows_bits_depend_neither_on_other_rows_nor_on_the_tile(operator: Head) -> None:
    """Steps of 1, 8, 32 and 64 rows, and a chunk, in every tactic: logits and tiles. The merge has a program a row."""
    inputs, attributes = head_inputs(operator, torch.bfloat16, 1, 70, TILE + 9, group=64, top_k=5)
    random = torch.Generator().manual_seed(1)
    inputs["x"] = torch.randn(inputs["x"].shape, generator=random).bfloat16()

    def rows_of(first: int, rows: int, tactic: Tactic) -> list[Tensor]:
        there = slice(first, first + rows)
        part = {name: tensor[:, there].contiguous() if name in _OF_ROWS else tensor for name, tensor in inputs.items()}
        return list(run(operator, part, tactic=tactic, **attributes)[0])

    tactics = list(operator.tactics(node_of(inputs, attributes)).values())
    expected = rows_of(0, 70, tactics[-1])
    for tactic in tactics:
        for first, rows in ((69, 1), (3, 8), (30, 32), (5, 64)):
            for found, whole in zip(rows_of(first, rows, tactic), expected, strict=True):
                assert torch.equal(found, whole[:, first : first + rows]), (tactic, first, rows)


_OF_ROWS = ("x", "squares", "asked_ids")


def test_one_candidate_writes_no_logits() -> None:
    """The traffic of a head is at most a fifth of a byte for each logit."""
    for operator in (Int4Head(normed=True), DenseHead(masked=True)):
        inputs, attributes = head_inputs(operator, torch.float16, 1, 8, 6 * TILE, top_k=1, asked=0)
        found, traffic = run(operator, inputs, **attributes)
        assert found[3].numel() == 0
        assert sum(tensor.stored for tensor in traffic.values()) * 5 <= 8 * 6 * TILE


def test_the_most_candidates() -> None:
    """More tiles than candidates, and fewer; the last tile has fewer tokens."""
    random = torch.Generator().manual_seed(0)
    for tiles in (80, 2):
        logits = torch.randn(1, 1, tiles * TILE + 7, generator=random)
        check(
            best_of(logits, top_k=MOST_CANDIDATES),
            plain(logits, legal_tokens(tuple(logits.shape), None), MOST_CANDIDATES),
        )


def test_candidates_may_all_be_in_one_tile() -> None:
    logits = torch.randn(1, 1, 5 * TILE, generator=torch.Generator().manual_seed(0))
    logits[..., 3 * TILE : 4 * TILE] += 100
    found = best_of(logits, top_k=MOST_CANDIDATES)
    assert set(found[1].flatten().tolist()) == set(range(3 * TILE, 4 * TILE))


def test_equal_logits_are_ordered_by_token_across_tiles() -> None:
    logits = torch.zeros(1, 1, 2 * TILE + 5)
    for token in (2 * TILE + 4, TILE + 3, TILE, 17, 2 * TILE):
        logits[..., token] = 1.5
    logits[..., 3] = -0.0
    logits[..., 4] = 0.0
    _, tokens, _ = best_of(logits, top_k=10)
    assert tokens.flatten().tolist() == [17, TILE, TILE + 3, 2 * TILE, 2 * TILE + 4, 0, 1, 2, 3, 4]
    _, tokens, _ = best_of(logits, top_k=1)
    assert tokens.flatten().tolist() == [17]


@pytest.mark.parametrize("top_k", [1, 4])
def test_the_mask_token_is_never_a_candidate(top_k: int) -> None:
    logits = torch.randn(1, 2, TILE, generator=torch.Generator().manual_seed(0))
    logits[..., HEAD_MASK_TOKEN] = float("nan")
    _, tokens, log_sum_exp = best_of(logits, top_k=top_k)
    assert HEAD_MASK_TOKEN not in tokens
    assert (log_sum_exp < 20).all()


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_row_without_a_legal_token_has_the_lowest_values(top_k: int) -> None:
    logits = torch.ones(1, 2, TILE + 40)
    words = torch.zeros(1, 2, TILE // 32 + 2, dtype=torch.int32)
    words[0, 1, 1] = -(2**31)  # token 63
    top_logits, tokens, log_sum_exp = best_of(logits, words, top_k=top_k)
    assert torch.equal(top_logits[0, 0], torch.full((top_k,), NEVER))
    assert tokens[0].tolist() == [[0, 1, 2][:top_k], [63, 0, 1][:top_k]]
    assert log_sum_exp[0].tolist() == [pytest.approx(NEVER), 1.0]
    assert top_logits[0, 1].tolist() == [1.0, pytest.approx(NEVER), pytest.approx(NEVER)][:top_k]


def test_very_high_and_very_low_logits_do_not_overflow() -> None:
    for logit in (-6e4, 6e4):
        logits = torch.full((1, 1, 100), logit)
        top_logits, _, log_sum_exp = best_of(logits, top_k=2)
        assert torch.equal(top_logits, torch.full((1, 1, 2), logit))
        torch.testing.assert_close(log_sum_exp, torch.full((1, 1), 99.0).log() + logit)
