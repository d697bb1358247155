"""References of the kernels from logits to candidates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimode.plugins.operators.candidates import NEVER, TILE


def top_candidates(
    logits: Tensor, token_mask: Tensor | None = None, *, top_k: int, mask_token: int
) -> tuple[Tensor, Tensor, Tensor]:
    """tile_logits, tile_tokens [B, L, T, k] and tile_sums [B, L, T].

    logits: [B, L, V]. token_mask: int32 [B, L, V / 32, rounded up], with a bit for each legal token. mask_token: never
    legal.
    """
    tokens = torch.arange(logits.shape[2], device=logits.device)
    legal = (tokens != mask_token).expand(logits.shape)
    if token_mask is not None:
        legal = legal & ((token_mask[..., tokens // 32] >> (tokens % 32)) & 1).bool()
    possible = logits.float().masked_fill(~legal, NEVER)
    padded = F.pad(possible, (0, -logits.shape[2] % TILE), value=NEVER)
    tiles = padded.reshape(*logits.shape[:2], -1, TILE)
    tile_logits, places = _best(tiles, top_k)
    first = torch.arange(tiles.shape[2], device=logits.device)[:, None] * TILE
    sums = tiles.masked_fill(tiles == NEVER, -torch.inf).logsumexp(-1).clamp(min=NEVER)
    return tile_logits, (first + places).int(), sums


def merge_candidates(
    tile_logits: Tensor, tile_tokens: Tensor, tile_sums: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """top_logits, top_tokens [B, L, k] and log_sum_exp [B, L]. Arguments: the results of :func:`top_candidates`."""
    top_logits, places = _best(tile_logits.flatten(2), top_k)
    return top_logits, tile_tokens.flatten(2).gather(2, places).long(), tile_sums.logsumexp(-1)


def asked_logits(logits: Tensor, asked_ids: Tensor) -> Tensor:
    """[B, L, A] in fp32, from logits [B, L, V] and asked_ids [B, L, A]."""
    return logits.gather(2, asked_ids).float()


def _best(values: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The highest values along the last dimension and their places, best first; equal ones in their order."""
    ordered, places = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :top_k], places[..., :top_k]
