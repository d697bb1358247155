"""The int4 product, interpreted, against the reference; the reference against the checkpoint's own dequantisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from scripts.gpu.kernel_checks import distance
from tests.support.kernel_cases import ProductCase, product_cases
from tests.support.kernel_functions import TOLERANCES, int4_product
from trimode.model import int4
from trimode.plugins.operators import Int4Product, Tactic
from trimode.plugins.operators.int4_product import LEAST_GROUP, within_group
from trimode.plugins.reference import int4_product as reference


def check(case: ProductCase) -> None:
    inputs = case.inputs()
    found, _ = int4_product(**inputs, tactic=case.tactic)
    assert distance(found, reference.int4_product(**inputs)) <= TOLERANCES[case.dtype]


@given(product_cases())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_product_equals_the_reference(case: ProductCase) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("tactic", Int4Product.TACTICS, ids=lambda tactic: str(tactic.constants["BLOCK_M"]))
def test_every_tactic_with_more_rows_than_a_tile(tactic: Tactic, dtype: torch.dtype) -> None:
    rows = tactic.constants["BLOCK_M"] + 1
    check(ProductCase(rows, 2, 130, input_scale=True, rank=128, residual=True, tactic=tactic, dtype=dtype))


@pytest.mark.parametrize("group", [16, 32, 48, 64])
@pytest.mark.parametrize("tactic", Int4Product.TACTICS, ids=lambda tactic: str(tactic.constants["BLOCK_M"]))
def test_every_tactic_with_small_groups(tactic: Tactic, group: int) -> None:
    """The tile along the inner dimension shrinks to fit into one group."""
    tactic = within_group(tactic, group)
    assert group % tactic.constants["BLOCK_K"] == 0
    assert tactic.constants["BLOCK_K"] >= LEAST_GROUP
    check(ProductCase(3, 5, 130, group=group, input_scale=True, tactic=tactic, dtype=torch.bfloat16))


def test_dequantisation_equals_the_checkpoints() -> None:
    """ModelOpt packs pairs of rows of [out, in]; transposed, these are the pool's pairs of columns."""
    weight = np.random.default_rng(0).standard_normal((96, 256)).astype(np.float32)
    integers, scale = int4.quantize(weight, 128)
    packed, scales = torch.from_numpy(int4.pack(integers).T.copy()), torch.from_numpy(scale.T.copy())
    assert np.array_equal(reference.dequantize(packed.view(torch.int8), scales), int4.dequantize(integers, scale).T)
