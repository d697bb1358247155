"""y = (x W) * row_scale + narrow up + residual, with sums in fp32. W is [K, N] in the type of the activations.

Each element of W is read once for BLOCK_M rows; longer steps (prefill) run more such tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.kernels.dependent_launch import wait_for_previous


@triton.jit
def dense_product_kernel(
    x,
    weight,
    row_scale,
    narrow,
    adapter_up,
    residual,
    rows,
    step,
    y,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAPABILITY: tl.constexpr,
):
    """A program computes BLOCK_M rows and BLOCK_N columns."""
    wait_for_previous(CAPABILITY)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    result = _add_product(result, x, weight, row, rows, column, INNER, COLUMNS, BLOCK_K)
    if row_scale is not None:
        factor = tl.load(row_scale + row // step, mask=row < rows, other=0.0)
        result *= factor.to(tl.float32)[:, None]
    if narrow is not None:
        result = _add_product(result, narrow, adapter_up, row, rows, column, RANK, COLUMNS, 16)
    here = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    at = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    if residual is not None:
        result += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=here)


@triton.jit
def _add_product(result, a, b, row, rows, column, INNER: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """result + a b, where a is [rows, INNER] and b is [INNER, COLUMNS]."""
    inner = tl.arange(0, BLOCK_K)
    in_row, in_column = (row < rows)[:, None], (column < COLUMNS)[None, :]
    of_a, of_b = a + row[:, None].to(tl.int64) * INNER, b + column[None, :]
    for first in tl.range(0, INNER, BLOCK_K):
        at = first + inner
        left = tl.load(of_a + at[None, :], mask=in_row & (at < INNER)[None, :], other=0.0)
        right = tl.load(of_b + at[:, None].to(tl.int64) * COLUMNS, mask=(at < INNER)[:, None] & in_column, other=0.0)
        result = tl.dot(left, right, result, input_precision="ieee")
    return result
