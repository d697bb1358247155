"""Reference of the KV write's kernel."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Returns q [B, HQ, S, D]. Writes rows ``write_indices`` .. + S of both caches [B, HKV, C, D] in place.

    qkv: [B, S, (HQ + 2 HKV) D]: the heads of q, then of k, then of v. cos, sin: [B, S, D / 2]. write_indices: [B].
    """
    batch, kv_heads, _capacity, head_dim = k_cache.shape
    heads = qkv.reshape(*qkv.shape[:2], -1, head_dim).transpose(1, 2)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
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
