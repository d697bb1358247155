"""Reference of the kernel from tiles to candidates."""

from __future__ import annotations

from torch import Tensor


def merge_candidates(
    tile_logits: Tensor, tile_tokens: Tensor, tile_sums: Tensor, logits: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """top_logits, top_tokens [B, L, k] and log_sum_exp [B, L]. Arguments: the results of
    :func:`trimode.plugins.reference.head_product.tiles_of_logits`.
    """
    if top_k == 1:
        top_logits, places = best(tile_logits, 1)
        top_tokens = tile_tokens.gather(2, places).long()
    else:
        top_logits, top_tokens = best(logits, top_k)
    return top_logits, top_tokens, tile_sums.logsumexp(-1)


def best(values: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The highest values along the last dimension and their places, best first; equal ones in their order."""
    ordered, places = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :top_k], places[..., :top_k]
