"""Both attention kernels, interpreted, against the reference; the reference against PyTorch's own attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from scripts.gpu.kernel_checks import distance
from scripts.gpu.kernel_launch import prepare
from tests.support.kernel_cases import DTYPES, GROUPS, AttentionCase, attention_cases
from tests.support.kernel_functions import TOLERANCES, attend, launch
from trimode.plugins.operators import Attend, Pattern, Tactic
from trimode.plugins.operators.attention import SPLIT_STEP, split_count
from trimode.plugins.reference import attention

PATTERNS: tuple[Pattern, ...] = ("causal", "bidirectional", "masked")


def check(case: AttentionCase) -> None:
    inputs = case.inputs()
    expected = attention.attend(**inputs)
    found, *_ = attend(**inputs, splits=case.splits, tactic=case.tactic)
    assert distance(found, expected) <= TOLERANCES[case.dtype]


@given(attention_cases())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_attention_equals_the_reference(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tactic", Attend.TACTICS, ids=lambda tactic: str(tactic.constants["BLOCK_M"]))
def test_every_tactic_with_a_long_sequence_among_short_ones(tactic: Tactic, pattern: Pattern) -> None:
    """Every tactic and every pattern meets every group, type and head size."""
    turn, other = Attend.TACTICS.index(tactic), PATTERNS.index(pattern)
    group = GROUPS[(turn + other) % 3]
    case = AttentionCase(
        committed=(37, 1499, 0, 130, 1, 18),
        step=min(64, 8 * tactic.constants["BLOCK_M"] // group),
        pattern=pattern,
        group=group,
        head_dim=(64, 128)[(turn + other) % 2],
        scaled=other > 0,
        tactic=tactic,
        dtype=DTYPES[(turn + 2 * other) % 3],
    )
    check(case)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prefill_chunk_has_fewer_splits(pattern: Pattern) -> None:
    case = AttentionCase((70, 0), 2 * SPLIT_STEP + 5, pattern, group=2, splits=4, tactic=Attend.TACTICS[0])
    assert split_count(case.splits, case.step) == 2
    check(case)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_sequence_without_visible_rows_gives_zeros(pattern: Pattern) -> None:
    case = AttentionCase((0, 5), 3, pattern, group=4)
    inputs = case.inputs()
    if pattern == "bidirectional":
        inputs["step_lengths"][:] = 0
        found, *_ = attend(**inputs)
        assert not found[0].any()
        assert found[1].all()
    if pattern == "masked":
        inputs["block_mask"][0] = False
        found, *_ = attend(**inputs)
        assert not found[0].any()
    check(case)


@pytest.mark.parametrize("tactic", Attend.TACTICS, ids=lambda tactic: str(tactic.constants["BLOCK_M"]))
def test_a_token_has_the_same_bits_in_every_step(tactic: Tactic) -> None:
    """In a verification of 17 tokens beside another sequence, and in a step of one token alone."""
    case = AttentionCase((75, 0), 17, "masked", group=4, splits=4, scaled=True, tactic=tactic, dtype=torch.bfloat16)
    inputs = case.inputs()
    inputs["block_mask"] = torch.ones(2, 17, 17, dtype=torch.bool).tril()
    whole, *_ = attend(**inputs, splits=case.splits, tactic=tactic)
    for token in (0, 5, 16):
        alone = {
            "q": inputs["q"][:1, :, token : token + 1].contiguous(),
            **{name: inputs[name][:1].clone() for name in ("k_cache", "v_cache")},
            "write_indices": inputs["write_indices"][:1] + token,
            "block_mask": torch.ones(1, 1, 1, dtype=torch.bool),
            "output_scale": inputs["output_scale"],
        }
        for name in ("k_cache", "v_cache"):
            alone[name][:, :, 75 + token + 1 :] = float("nan")
        found, *_ = attend(**alone, splits=case.splits, tactic=Attend.TACTICS[0])
        assert torch.equal(found[0, 0], whole[0, token])


def test_a_tile_that_a_token_does_not_see_changes_no_bit() -> None:
    """In a step of 64, a token has tiles of KV rows after it, also in splits that hold earlier rows of it. Each
    split's result is compared, since its bits are lost in the rounding of the merged one.
    """
    case = AttentionCase((192,), 64, "masked", group=1, head_dim=64, splits=2)
    inputs = case.inputs()
    inputs["k_cache"] *= 4  # logits whose products with log2(e) are not exact
    inputs["block_mask"] = torch.ones(1, 64, 64, dtype=torch.bool).tril()
    whole = split_results(inputs)
    for token in range(0, 64, 3):
        alone = {
            **inputs,
            "q": inputs["q"][:, :, token : token + 1].contiguous(),
            "write_indices": inputs["write_indices"] + token,
            "block_mask": torch.ones(1, 1, 1, dtype=torch.bool),
        }
        for found, expected in zip(split_results(alone), whole, strict=True):
            assert torch.equal(found[:, :, :, 0], expected[:, :, :, token])


def split_results(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The partial results and their log-sum-exps."""
    launched = prepare(Attend("masked"), inputs, Attend.TACTICS[0], {"splits": 2})
    launch(launched)
    return launched.outputs


def test_the_result_does_not_depend_on_the_number_of_splits() -> None:
    case = AttentionCase((900,), 5, "causal", group=4)
    alone, *_ = attend(**case.inputs(), splits=1)
    for splits in (2, 7, 16):
        merged, *_ = attend(**case.inputs(), splits=splits)
        assert distance(merged, alone) < TOLERANCES[torch.float32]


def test_a_lower_triangle_is_causal_and_a_full_mask_bidirectional() -> None:
    case = AttentionCase((40, 3), 9, "causal", group=4)
    inputs = case.inputs()
    for mask, other in (
        (torch.ones(2, 9, 9).tril().bool(), {}),
        (torch.ones(2, 9, 9).bool(), {"step_lengths": torch.tensor([9, 9])}),
    ):
        masked, *_ = attend(**inputs, block_mask=mask)
        plain, *_ = attend(**inputs, **other)
        assert distance(masked, plain) < TOLERANCES[torch.float32]


def test_a_sequence_does_not_depend_on_the_rest_of_the_batch() -> None:
    case = AttentionCase((130, 20, 77), 4, "causal", group=4, kv_heads=2)
    inputs = case.inputs()
    together, *_ = attend(**inputs)
    for sequence in range(case.batch):
        alone, *_ = attend(**{name: tensor[sequence : sequence + 1].clone() for name, tensor in inputs.items()})
        assert torch.equal(alone[0], together[sequence])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reference_equals_pytorchs_attention(pattern: Pattern) -> None:
    case = replace(AttentionCase((13,), 6, pattern, group=4, kv_heads=2), slack=0)
    inputs = {name: tensor.nan_to_num() for name, tensor in case.inputs().items()}
    extra = (inputs.get("step_lengths"), inputs.get("block_mask"))
    seen = attention.visible(case.step, inputs["write_indices"], case.capacity, *extra)
    expected = F.scaled_dot_product_attention(
        inputs["q"], inputs["k_cache"], inputs["v_cache"], attn_mask=seen[:, None], scale=1.0, enable_gqa=True
    )
    found = attention.attend(**inputs)
    assert distance(found, expected.transpose(1, 2).flatten(2)) < TOLERANCES[torch.float32]


def test_the_merges_reference_is_a_softmax_over_splits() -> None:
    random = torch.Generator().manual_seed(0)
    partial = torch.randn(1, 3, 2, 4, 64, generator=random)
    log_sum_exp = torch.randn(1, 3, 2, 4, generator=random)
    log_sum_exp[:, 1] = -torch.inf
    partial[:, 1] = torch.nan
    merged = attention.merge(partial, log_sum_exp)
    weights = log_sum_exp[:, [0, 2]].softmax(1)
    expected = (partial[:, [0, 2]] * weights[..., None]).sum(1).transpose(1, 2).flatten(2)
    assert distance(merged, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    ("pattern", "batch", "step", "queries"),
    [
        ("masked", 1, 1, 64),
        ("masked", 1, 32, 128),
        ("masked", 16, 32, 64),
        ("bidirectional", 16, 32, 128),
        ("bidirectional", 16, 16, 64),
        ("bidirectional", 16, 64, 64),
    ],
)
def test_the_default_tile(pattern: Pattern, batch: int, step: int, queries: int) -> None:
    """As measured on an H100 (docs/results-h100.md)."""
    operator = Attend(pattern)
    node = operator.node(batch=batch, step=step, capacity=512, splits=16, kv_heads=8, group=4, head_dim=128)
    number = operator.default_tactic(node, (1, 2, 3))
    assert operator.tactics(node)[number].constants["BLOCK_M"] == queries
