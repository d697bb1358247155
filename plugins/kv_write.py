"""The step's queries, keys and values: rotated, scaled, and put where attention reads them.

One pass over the merged product's rows. Keys and values go to their rows of the KV pool in place; the queries' rotation
carries the scale of their position and the softmax's, so nothing downstream multiplies them again.

A paged pool would change one line: the row of a token would be ``page_table[sequence, row // PAGE] * PAGE + row %
PAGE`` of a pool without a batch dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    """One program is one token: every head reads the same cos and sin. ``k_cache`` is the memory of ``k_cache_out``."""
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
    # A row past the pool's end is no head's to write.
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


def kv_write(
    qkv: Tensor,
    query_cos: Tensor,
    query_sin: Tensor,
    key_cos: Tensor,
    key_sin: Tensor,
    write_indices: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """The reference: q [B, HQ, S, D]; rows ``write_indices`` .. + S of both caches [B, HKV, C, D] are written in place.

    qkv: [B, S, (HQ + 2 HKV) D], heads of q, of k, of v side by side. cos, sin: [B, S, D / 2]. write_indices: [B].
    """
    batch, kv_heads, _capacity, head_dim = k_cache.shape
    heads = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    for sequence in range(batch):
        first = int(write_indices[sequence])
        rows = slice(first, first + qkv.shape[1])
        k_cache[sequence, :, rows] = _rotated(k[sequence], key_cos[sequence], key_sin[sequence])
        v_cache[sequence, :, rows] = v[sequence]
    return _rotated(q, query_cos[:, None], query_sin[:, None])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split (NeoX) rotation in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
