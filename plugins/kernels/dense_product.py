"""y = (x W) * row_scale + narrow up + residual, with sums in fp32. W is [K, N] in the type of the activations.

Each element of W is read once for BLOCK_M rows; longer steps (prefill) run more such tiles. A matrix of few columns has
few tiles, so K is split between programs, as in :mod:`trimode.plugins.kernels.int4_product`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.kernels.int4_product import SPLIT_ROWS, combined


@triton.jit
def dense_product_kernel(
    x,
    weight,
    row_scale,
    narrow,
    adapter_up,
    residual,
    counters,
    rows,
    step,
    y,
    partial,
    counters_out,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program computes BLOCK_M rows and BLOCK_N columns of one part of K, or of all SPLITS parts."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    complete = True
    if SPLITS == 1:
        result = _add_product(zeros, x, weight, row, rows, column, 0, INNER, INNER, COLUMNS, BLOCK_K)
    else:
        PART: tl.constexpr = INNER // SPLITS
        part = tl.program_id(2)
        separate = rows <= SPLIT_ROWS
        complete = part == 0
        first, end = 0, SPLITS * complete.to(tl.int32)
        if separate:
            first, end = part, part + 1
        result = zeros
        for index in tl.range(first, end):
            result += _add_product(zeros, x, weight, row, rows, column, index * PART, PART, INNER, COLUMNS, BLOCK_K)
        if separate:
            sums = partial + row[:, None] * COLUMNS + column[None, :]
            complete, result = combined(result, part, sums, here, counters_out, COLUMNS, SPLITS)
    if complete:
        if row_scale is not None:
            factor = tl.load(row_scale + row // step, mask=row < rows, other=0.0)
            result *= factor.to(tl.float32)[:, None]
        if narrow is not None:
            result = _add_product(result, narrow, adapter_up, row, rows, column, 0, RANK, RANK, COLUMNS, 16)
        in_y = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        if residual is not None:
            result += tl.load(residual + in_y, mask=here, other=0.0).to(tl.float32)
        tl.store(y + in_y, result.to(y.dtype.element_ty), mask=here)


@triton.jit
def _add_product(
    result,
    a,
    b,
    row,
    rows,
    column,
    start,
    COUNT: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """result + a b over COUNT inner columns from ``start`` on, where a is [rows, INNER] and b is [INNER, COLUMNS]."""
    inner = tl.arange(0, BLOCK_K)
    in_row, in_column = (row < rows)[:, None], (column < COLUMNS)[None, :]
    of_a, of_b = a + row[:, None].to(tl.int64) * INNER, b + column[None, :]
    end = start + COUNT
    for first in tl.range(start, end, BLOCK_K):
        at = first + inner
        left = tl.load(of_a + at[None, :], mask=in_row & (at < end)[None, :], other=0.0)
        right = tl.load(of_b + at[:, None].to(tl.int64) * COLUMNS, mask=(at < end)[:, None] & in_column, other=0.0)
        result = tl.dot(left, right, result, input_precision="ieee")
    return result
