"""The operators around attention and int4 products, interpreted, against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scripts.gpu.kernel_checks import distance
from scripts.gpu.kernel_launch import node_of
from tests.support.kernel_cases import DTYPES, operator_inputs
from tests.support.kernel_functions import TOLERANCES, reference_of, run
from trimode.plugins.operators import OPERATORS, DenseProduct, Rotations
from trimode.plugins.reference import dense_product, swiglu

EXACT = ("Embed", "SelectRows")
NAMES = (*EXACT, "EmbedForNorm", "Rotations", "RmsNorm", "SwiGlu")
PRODUCTS = [name for name in OPERATORS if name.startswith("DenseProduct")]


def check(name: str, dtype: torch.dtype, inputs: dict[str, Tensor], attributes: dict[str, int], **options: Any) -> None:
    """Copies are equal to the bit. Other results are within the tolerance of the type."""
    found, _ = run(OPERATORS[name], inputs, real=dtype, **options, **attributes)
    if (counters := inputs.get("counters")) is not None:
        assert not counters.any()
        found = found[:1]
    given_ = {operand: tensor for operand, tensor in inputs.items() if operand != "counters"}
    expected = reference_of(name, dtype)(**given_, **attributes)
    for result, wanted in zip(found, (expected,) if isinstance(expected, Tensor) else expected, strict=True):
        assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
        if name in EXACT:
            assert torch.equal(result, wanted)
        assert distance(result, wanted) <= TOLERANCES[dtype]


@pytest.mark.parametrize("name", NAMES)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    step=st.integers(1, 6),
    width=st.integers(1, 700).map(lambda half: 2 * half),
    vocabulary=st.integers(40, 300),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_an_operator_equals_its_reference(name: str, dtype: torch.dtype, seed: int, **sizes: int) -> None:
    inputs, attributes = operator_inputs(name, dtype, seed=seed, **sizes)
    for tactic in OPERATORS[name].tactics(node_of(inputs, attributes)).values():
        check(name, dtype, inputs, attributes, tactic=tactic)


@pytest.mark.parametrize("name", PRODUCTS)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    step=st.integers(1, 48),
    width=st.integers(1, 300),
    tactic=st.sampled_from(DenseProduct.TACTICS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_a_dense_product_equals_its_reference(name: str, dtype: torch.dtype, tactic: Any, **sizes: int) -> None:
    """Any inner size and any number of columns, with every tile."""
    inputs, attributes = operator_inputs(name, dtype, **sizes)
    check(name, dtype, inputs, attributes, tactic=tactic)


def test_the_rows_of_a_product_may_be_spread_over_dimensions() -> None:
    inputs, _ = operator_inputs("DenseProductAdaptedResidual", torch.float32, batch=1, step=6)
    (flat,), _ = run(OPERATORS["DenseProductAdaptedResidual"], inputs)
    spread = {
        name: tensor.reshape(2, 3, -1) if name in ("x", "narrow", "residual") else tensor
        for name, tensor in inputs.items()
    }
    (found,), _ = run(OPERATORS["DenseProductAdaptedResidual"], spread)
    assert torch.equal(found, flat.reshape(2, 3, -1))
    assert distance(found, dense_product.dense_product(**spread)) < TOLERANCES[torch.float32]


def test_separate_parts_give_the_bits_of_one_program() -> None:
    """The rows of a step of 64, alone and before others, which one program sums."""
    operator = OPERATORS["DenseProductSplitRowScaled"]
    inputs, _ = operator_inputs(operator.name, torch.float32, batch=1, step=64, width=60)
    tactic = DenseProduct.TACTICS[0]
    (whole, *_), _ = run(operator, inputs, tactic=tactic)
    longer = {**inputs, "x": torch.cat([inputs["x"][:, 32:], inputs["x"]], 1)}
    (found, *_), _ = run(operator, longer, tactic=tactic)
    assert torch.equal(found[:, 32:], whole)


def test_a_zero_row_scale_leaves_no_adapter() -> None:
    inputs, _ = operator_inputs("DenseProductRowScaled", torch.float32, batch=2, step=17)
    inputs["row_scale"][0] = 0
    (found,), _ = run(OPERATORS["DenseProductRowScaled"], inputs)
    assert not found[0].any()
    assert found[1].all()


def far_angles(dtype: torch.dtype) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Positions up to 262,143 with frequencies from 1 radian down, and the kernel's four tables."""
    positions = torch.cat((torch.arange(8), torch.arange(16380, 16390), torch.arange(262124, 262144)))
    inputs = {
        "position_ids": positions.reshape(2, -1),
        "frequencies": torch.tensor(1e6) ** (-torch.arange(32) / 32),
        "key_scale": torch.tensor([1.0]),
        "query_scales": torch.tensor([1.0, 1.5, 2.0]),
    }
    return inputs, run(Rotations(), inputs, real=dtype, length=16384)[0]


def test_rotations_are_accurate_at_far_positions() -> None:
    """Within 1.5e-7 of the cos and sin, in fp64, of the fp32 angle. The last scale serves all later positions."""
    inputs, (query_cos, query_sin, key_cos, key_sin) = far_angles(torch.float32)
    angles = (inputs["position_ids"].float()[..., None] * inputs["frequencies"]).double()
    scale = torch.tensor([1.0, 1.5, 2.0])[(inputs["position_ids"] // 16384).clamp(max=2)][..., None]
    assert float((key_cos - angles.cos()).abs().max()) < 1.5e-7
    assert float((key_sin - angles.sin()).abs().max()) < 1.5e-7
    assert torch.equal(query_cos, key_cos * scale)
    assert torch.equal(query_sin, key_sin * scale)
    assert set(scale.flatten().tolist()) == {1.0, 1.5, 2.0}


def test_angles_are_products_in_fp32() -> None:
    """At far positions the exact product of position and frequency has another cos."""
    inputs, (*_, key_cos, _) = far_angles(torch.float32)
    exact = (inputs["position_ids"].double()[..., None] * inputs["frequencies"].double()).cos()
    assert float((key_cos - exact).abs().max()) > 5e-3


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_a_large_gate_gives_no_nan() -> None:
    """exp overflows for large negative gates."""
    gates = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    gate_up = torch.cat((gates, torch.full_like(gates, 3.0)))[None]
    (found,), _ = run(OPERATORS["SwiGlu"], {"gate_up": gate_up})
    torch.testing.assert_close(found, swiglu.swiglu(gate_up))


def test_a_row_of_zeros_has_a_norm() -> None:
    inputs, _ = operator_inputs("RmsNorm", torch.float32)
    inputs["x"][0, 0] = 0
    (found,), _ = run(OPERATORS["RmsNorm"], inputs)
    assert not found[0, 0].any()
    assert found[0, 1].all()
