"""What remains of a root mean square norm when the product before it and the product behind it compute it.

The product before it, which writes the residual stream x, also writes x * weight and the sums of x^2 over tiles of
:data:`NORM_COLUMNS` columns. The product behind it multiplies x * weight, and then its result by 1 / rms of each row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.operators import norm_terms

NORM_COLUMNS = tl.constexpr(norm_terms.NORM_COLUMNS)


@triton.jit
def write_norm_terms(x, next_weight, weighted, next_squares, column, row, rows, WIDTH: tl.constexpr):
    """x: fp32 [columns, rows], already rounded; zeros behind the last column. column, row: of x."""
    inside = column < WIDTH
    here = inside[:, None] & (row < rows)[None, :]
    weight = tl.load(next_weight + column, mask=inside, other=0.0).to(tl.float32)
    in_weighted = weighted + row[None, :].to(tl.int64) * WIDTH + column[:, None]
    tl.store(in_weighted, (x * weight[:, None]).to(weighted.dtype.element_ty), mask=here)
    TILES: tl.constexpr = x.shape[0] // NORM_COLUMNS
    squares = tl.reshape(x * x, [TILES, NORM_COLUMNS, x.shape[1]])
    tile = tl.min(column, 0) // NORM_COLUMNS + tl.arange(0, TILES)
    exists = (tile * NORM_COLUMNS < WIDTH)[:, None] & (row < rows)[None, :]
    tl.store(next_squares + tile[:, None] * rows + row[None, :], _sum_in_any_order(squares), mask=exists)


@triton.jit
def _sum_in_any_order(values):
    """The sum of non-negative numbers over axis 1, of at most 255 numbers: the same bits in any order.

    Each number is rounded to a multiple of 2^-23 of the power of two above the largest one, and the multiples are added
    as integers.
    """
    largest = tl.max(values, 1)
    # The exponent's bits: 2^(exponent - 127) <= largest. Numbers below 2^-97 are 0.
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 30)
    to_integers = ((276 - exponent) << 23).to(tl.float32, bitcast=True)
    integers = (values * to_integers[:, None, :] + 0.5).to(tl.int32)
    return tl.sum(integers, 1).to(tl.float32) * ((exponent - 22) << 23).to(tl.float32, bitcast=True)


@triton.jit
def one_over_rms(squares, epsilon, row, rows, WIDTH: tl.constexpr):
    """Of these rows, in fp32."""
    TILES: tl.constexpr = (WIDTH + NORM_COLUMNS - 1) // NORM_COLUMNS
    PADDED: tl.constexpr = triton.next_power_of_2(TILES)
    tile = tl.arange(0, PADDED)[:, None]
    sums = tl.load(squares + tile * rows + row[None, :], mask=(tile < TILES) & (row < rows)[None, :], other=0.0)
    total = _sum_in_any_order(tl.reshape(sums, [1, PADDED, row.shape[0]]))
    return 1 / tl.sqrt_rn(tl.reshape(total, [row.shape[0]]) / WIDTH + tl.load(epsilon))
