"""Rotate the step's queries and keys, and write keys and values into the KV pool.

One pass over the rows of the qkv product. The pool is written in place. The queries' cos and sin include the position's
scale and the softmax's, so attention does not scale them again.

A paged pool would change one line: a token's row would be ``page_table[sequence, row // PAGE] * PAGE + row % PAGE`` of
a pool without a batch dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kv_write_kernel(
    qkv,
    query_cos,
    query_sin,
    key_cos,
    key_sin,
    write_indices,
    k_cache,
    v_cache,
    step,
    capacity,
    q,
    k_cache_out,
    v_cache_out,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """A program handles one token: all heads share its cos and sin. ``k_cache_out`` is the memory of ``k_cache``."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    HEADS: tl.constexpr = KV_HEADS * GROUP
    HALF: tl.constexpr = HEAD_DIM // 2
    source = qkv + (batch * step + token) * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angle = (batch * step + token) * HALF + tl.arange(0, HALF)[None, :]
    row = tl.load(write_indices + batch) + token

    head = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    first = head * HEAD_DIM + tl.arange(0, HALF)[None, :]
    target = q + ((batch * HEADS + head) * step + token) * HEAD_DIM + tl.arange(0, HALF)[None, :]
    _rotate(source + first, target, tl.load(query_cos + angle), tl.load(query_sin + angle), head < HEADS, HALF)

    head = tl.arange(0, triton.next_power_of_2(KV_HEADS))[:, None]
    # Rows past the end of the pool are not written.
    exists = head < tl.where(row < capacity, KV_HEADS, 0)
    first = (HEADS + head) * HEAD_DIM + tl.arange(0, HALF)[None, :]
    cache_row = ((batch * KV_HEADS + head) * capacity + row) * HEAD_DIM
    target = k_cache_out + cache_row + tl.arange(0, HALF)[None, :]
    _rotate(source + first, target, tl.load(key_cos + angle), tl.load(key_sin + angle), exists, HALF)

    column = tl.arange(0, HEAD_DIM)[None, :]
    value = tl.load(source + (HEADS + KV_HEADS + head) * HEAD_DIM + column, mask=exists)
    tl.store(v_cache_out + cache_row + column, value, mask=exists)


@triton.jit
def _rotate(source, target, cos, sin, exists, HALF: tl.constexpr):
    first = tl.load(source, mask=exists).to(tl.float32)
    second = tl.load(source + HALF, mask=exists).to(tl.float32)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    element = target.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(element), mask=exists)
    tl.store(target + HALF, (second * cos + first * sin).to(element), mask=exists)
