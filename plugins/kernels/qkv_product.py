"""The int4 product of queries, keys and values, which are rotated and written where attention reads them.

The columns are pairs in the order of :data:`trimode.plugins.operators.int4_product.PAIRED`: of each head, column i and
column i + HEAD_DIM / 2, which a rotation turns into each other. Values are pairs as well; they are not rotated.

A paged pool would change one line: a token's row would be ``page_table[sequence, row // PAGE] * PAGE + row % PAGE`` of
a pool without a batch dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.kernels.int4_product import halves_of, product_sum
from trimode.plugins.kernels.norm_terms import one_over_rms


@triton.jit
def qkv_product_kernel(
    x,
    packed,
    scale,
    squares,
    epsilon,
    query_cos,
    query_sin,
    key_cos,
    key_sin,
    write_indices,
    k_cache,
    v_cache,
    counters,
    rows,
    step,
    capacity,
    q,
    partial,
    k_cache_out,
    v_cache_out,
    counters_out,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    CAPABILITY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """HEADS: of the queries. GROUP: rows of W that share a scale. CAPABILITY: compute capability, 90 for 9.0; None in
    the interpreter.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if squares is not None:
        norm = one_over_rms(squares, epsilon, row, rows, INNER)
    complete, result = product_sum(
        x, packed, scale, partial, counters_out, row, rows, column,
        INNER, COLUMNS, GROUP, UNIT, SPLITS, BLOCK_M, BLOCK_N, STEPS, CAPABILITY, STAGES,
    )  # fmt: skip
    if complete:
        HALF: tl.constexpr = HEAD_DIM // 2
        if squares is not None:
            result *= norm[None, :]
        first, second = halves_of(result)
        pair = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        head, in_head = pair // HALF, pair % HALF
        exists = row < rows
        is_query = (head < HEADS)[:, None] & exists[None, :]
        is_key = ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None] & exists[None, :]
        is_value = ((head >= HEADS + KV_HEADS) & (pair < COLUMNS // 2))[:, None] & exists[None, :]

        angle = row[None, :] * HALF + in_head[:, None]
        cos = tl.load(query_cos + angle, mask=is_query, other=1.0).to(tl.float32)
        sin = tl.load(query_sin + angle, mask=is_query, other=0.0).to(tl.float32)
        cos = tl.where(is_key, tl.load(key_cos + angle, mask=is_key, other=1.0).to(tl.float32), cos)
        sin = tl.where(is_key, tl.load(key_sin + angle, mask=is_key, other=0.0).to(tl.float32), sin)
        # Fused explicitly, so that all tiles round alike.
        element: tl.constexpr = q.dtype.element_ty
        turned = tl.fma(first, cos, -(second * sin)).to(element)
        turned_second = tl.fma(second, cos, first * sin).to(element)

        token, batch = row % step, (row // step).to(tl.int64)
        in_q = ((batch * (HEADS * step) + token) * HEAD_DIM)[None, :] + (head * step * HEAD_DIM + in_head)[:, None]
        tl.store(q + in_q, turned, mask=is_query)
        tl.store(q + in_q + HALF, turned_second, mask=is_query)

        # Rows past the end of the pool are not written.
        cache_row = tl.load(write_indices + batch, mask=exists, other=0) + token
        inside = (cache_row < capacity)[None, :]
        of_head = ((head - HEADS) % KV_HEADS).to(tl.int64) * capacity * HEAD_DIM + in_head
        in_cache = ((batch * (KV_HEADS * capacity) + cache_row) * HEAD_DIM)[None, :] + of_head[:, None]
        tl.store(k_cache_out + in_cache, turned, mask=is_key & inside)
        tl.store(k_cache_out + in_cache + HALF, turned_second, mask=is_key & inside)
        tl.store(v_cache_out + in_cache, first.to(element), mask=is_value & inside)
        tl.store(v_cache_out + in_cache + HALF, second.to(element), mask=is_value & inside)
