"""y = (x * input_scale) W + narrow up + residual. W is int4 as in the weight pool, with a scale for each group and
column.

A byte of the pool holds two neighbouring columns, so a tile of bytes gives two products, of the even and of the odd
columns. Their sums are interleaved once at the end; weights are never rearranged. The integers themselves are
multiplied, exact in every type, and the group's scale multiplies the group's sum in fp32: one multiplication for each
group, not for each weight. Each byte of W is read once for BLOCK_M rows; longer steps (prefill) run more such tiles.

Integers are converted to floats by their bits: with n + 8 in the low bits of 2^m, the number is 2^m + n + 8, and one
exact subtraction gives n. GPUs convert integers at a fraction of the rate of these operations.

``narrow`` = scale (x down) is an input: it has only R columns, and to compute it here each program would have to read
all of x and ``down``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def int4_product_kernel(
    x,
    packed,
    scale,
    input_scale,
    narrow,
    adapter_up,
    residual,
    rows,
    y,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program computes BLOCK_M rows and BLOCK_N columns; below 16 rows, without tensor cores."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    if BLOCK_M < 16:
        even, odd = _few_rows(x, packed, scale, input_scale, row, rows, pair, INNER, COLUMNS, GROUP, BLOCK_K)
    else:
        even, odd = _many_rows(x, packed, scale, input_scale, row, rows, pair, INNER, COLUMNS, GROUP, BLOCK_K)
    result = tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_N])

    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    if narrow is not None:
        result += _adapter(narrow, adapter_up, row, rows, column, COLUMNS, RANK, BLOCK_M)
    at = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    if residual is not None:
        result += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=here)


@triton.jit
def _many_rows(
    x,
    packed,
    scale,
    input_scale,
    row,
    rows,
    pair,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of the even and of the odd columns, each [rows, columns / 2], on tensor cores."""
    inner = tl.arange(0, BLOCK_K)
    exists, inside = (row < rows)[:, None], (pair < COLUMNS // 2)[None, :]
    even = tl.zeros([row.shape[0], pair.shape[0]], tl.float32)
    odd = tl.zeros([row.shape[0], pair.shape[0]], tl.float32)
    for first in tl.range(0, INNER, BLOCK_K):
        a = tl.load(x + row[:, None].to(tl.int64) * INNER + first + inner[None, :], mask=exists, other=0.0)
        if input_scale is not None:
            a = (a.to(tl.float32) * tl.load(input_scale + first + inner)[None, :].to(tl.float32)).to(a.dtype)
        pairs = tl.load(packed + (first + inner)[:, None] * (COLUMNS // 2) + pair[None, :], mask=inside, other=0)
        at = scale + first // GROUP * COLUMNS + 2 * pair[None, :]
        even += tl.dot(a, _to_float(pairs & 15, a.dtype), input_precision="ieee") * tl.load(at, mask=inside, other=0.0)
        odd += tl.dot(a, _to_float((pairs >> 4) & 15, a.dtype), input_precision="ieee") * tl.load(
            at + 1, mask=inside, other=0.0
        )
    return even, odd


@triton.jit
def _few_rows(
    x,
    packed,
    scale,
    input_scale,
    row,
    rows,
    pair,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same in fp32 arithmetic: [rows, inner, columns / 2] at a time; the inner dimension is summed at the end."""
    inner = tl.arange(0, BLOCK_K)
    exists, inside = (row < rows)[:, None], (pair < COLUMNS // 2)[None, :]
    even = tl.zeros([row.shape[0], BLOCK_K, pair.shape[0]], tl.float32)
    odd = tl.zeros([row.shape[0], BLOCK_K, pair.shape[0]], tl.float32)
    for first in tl.range(0, INNER, BLOCK_K):
        a = tl.load(x + row[:, None].to(tl.int64) * INNER + first + inner[None, :], mask=exists, other=0.0)
        a = a.to(tl.float32)
        if input_scale is not None:
            a *= tl.load(input_scale + first + inner)[None, :].to(tl.float32)
        pairs = tl.load(packed + (first + inner)[:, None] * (COLUMNS // 2) + pair[None, :], mask=inside, other=0)
        at = scale + first // GROUP * COLUMNS + 2 * pair[None, :]
        low = _to_float(pairs & 15, tl.float32) * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        high = _to_float((pairs >> 4) & 15, tl.float32) * tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
        even += a[:, :, None] * low[None, :, :]
        odd += a[:, :, None] * high[None, :, :]
    return tl.sum(even, 1), tl.sum(odd, 1)


@triton.jit
def _to_float(nibble, dtype: tl.constexpr):
    """Two's-complement nibbles as floats of the type."""
    biased = nibble ^ 8  # n + 8
    if dtype == tl.float16:
        return (biased.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0  # 2^10 + 8
    elif dtype == tl.bfloat16:
        return (biased.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0  # 2^7 + 8
    else:
        return ((biased.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0).to(dtype)  # 2^23 + 8


@triton.jit
def _adapter(narrow, adapter_up, row, rows, column, COLUMNS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr):
    """narrow up: [rows, columns]."""
    BLOCK: tl.constexpr = 16
    inner = tl.arange(0, BLOCK)
    result = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for first in tl.range(0, RANK, BLOCK):
        at = first + inner
        in_a, in_b = (row < rows)[:, None] & (at < RANK)[None, :], (at < RANK)[:, None] & (column < COLUMNS)[None, :]
        a = tl.load(narrow + row[:, None] * RANK + at[None, :], mask=in_a, other=0.0)
        b = tl.load(adapter_up + at[:, None] * COLUMNS + column[None, :], mask=in_b, other=0.0)
        if BLOCK_M < 16:
            result += tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
        else:
            result = tl.dot(a, b, result, input_precision="ieee")
    return result
