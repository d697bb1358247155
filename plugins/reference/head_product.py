"""References of the kernels of a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimode.plugins.operators.candidates import NEVER, TILE
from trimode.plugins.reference.candidates import best
from trimode.plugins.reference.int4_product import int4_product

# tile_logits, tile_tokens, tile_sums [B, L, T], logits [B, L, V or 0] and asked_logits [B, L, A].
HeadResults = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tiles_of_logits(
    logits: Tensor, asked_ids: Tensor, token_mask: Tensor | None = None, *, top_k: int, mask_token: int
) -> HeadResults:
    """logits: [B, L, V] in fp32. asked_ids: [B, L, A]. token_mask: int32 [B, L, V / 32, rounded up], with a bit for
    each legal token. mask_token: never legal.
    """
    tokens = torch.arange(logits.shape[2], device=logits.device)
    legal = (tokens != mask_token).expand(logits.shape)
    if token_mask is not None:
        legal = legal & ((token_mask[..., tokens // 32] >> (tokens % 32)) & 1).bool()
    possible = logits.masked_fill(~legal, NEVER)
    tiles = F.pad(possible, (0, -logits.shape[2] % TILE), value=NEVER).reshape(*logits.shape[:2], -1, TILE)
    tile_logits, places = best(tiles, 1)
    first = torch.arange(tiles.shape[2], device=logits.device) * TILE
    sums = tiles.masked_fill(tiles == NEVER, -torch.inf).logsumexp(-1).clamp(min=NEVER)
    listed = possible if top_k > 1 else possible[..., :0]
    return tile_logits[..., 0], (first + places[..., 0]).int(), sums, listed, logits.gather(2, asked_ids)


def int4_head(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    asked_ids: Tensor,
    token_mask: Tensor | None = None,
    squares: Tensor | None = None,
    epsilon: Tensor | None = None,
    *,
    top_k: int,
    mask_token: int,
) -> HeadResults:
    """x: [B, L, K]. squares: [T, B L], and epsilon: [1], of the norm whose weighted input x is."""
    logits = int4_product(x.float(), packed, scale, squares=squares, epsilon=epsilon)
    return tiles_of_logits(logits, asked_ids, token_mask, top_k=top_k, mask_token=mask_token)


def dense_head(
    x: Tensor, weight: Tensor, asked_ids: Tensor, token_mask: Tensor | None = None, *, top_k: int, mask_token: int
) -> HeadResults:
    """x: [B, L, K]. weight: [K, V]."""
    return tiles_of_logits(x.float() @ weight.float(), asked_ids, token_mask, top_k=top_k, mask_token=mask_token)
