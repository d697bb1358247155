"""int4 packing along the rows, low nibble first, and rounding to nearest."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trimode.model import int4

INTEGERS = arrays(
    np.int8,
    st.tuples(st.integers(1, 6).map(lambda pairs: 2 * pairs), st.integers(1, 9)),
    elements=st.integers(-8, 7),
)


@given(INTEGERS)
def test_unpack_undoes_pack(integers: np.ndarray) -> None:
    assert np.array_equal(int4.unpack(int4.pack(integers)), integers)


def test_order_of_nibbles() -> None:
    integers = np.array([[1, -1], [2, -8], [3, 7], [4, 0]], np.int8)
    expected = [[0x21, 0x8F], [0x43, 0x07]]
    assert int4.pack(integers).tolist() == expected


@given(st.integers(0, 2**32 - 1))
def test_error_is_at_most_half_a_step(seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32)
    integers, scale = int4.quantize(weight, group=32)
    error = np.abs(int4.dequantize(integers, scale) - weight).reshape(4, 2, 32)
    assert (error <= scale[..., None] * 0.5001).all()


def test_a_group_of_zeros_stays_zero() -> None:
    integers, scale = int4.quantize(np.zeros((2, 32), np.float32), group=32)
    assert not integers.any()
    assert np.isfinite(scale).all()
