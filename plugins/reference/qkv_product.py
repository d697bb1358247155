"""Reference of the kernel of the product of queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from trimode.plugins.reference.int4_product import halves, int4_product
from trimode.plugins.reference.kv_write import kv_write


def qkv_product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    *,
    squares: Tensor | None = None,
    epsilon: Tensor | None = None,
    query_cos: Tensor,
    query_sin: Tensor,
    key_cos: Tensor,
    key_sin: Tensor,
    write_indices: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Returns q [B, HQ, S, D]. Writes rows ``write_indices`` .. + S of both caches [B, HKV, C, D] in place.

    x: [B, S, K]. squares, epsilon: as for :func:`int4_product`. The columns of W are the pairs of each head of q, k and
    v. cos, sin: [B, S, D / 2].
    """
    y = int4_product(x, packed, scale, squares=squares, epsilon=epsilon)
    half = k_cache.shape[3] // 2
    pairs = [part.reshape(*part.shape[:-1], -1, half) for part in halves(y)]
    qkv = torch.cat(pairs, dim=-1).flatten(-2)
    return kv_write(qkv, query_cos, query_sin, key_cos, key_sin, write_indices, k_cache, v_cache)
