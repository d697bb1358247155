"""What the operators ``Embed`` and ``EmbedForNorm`` compute."""

from __future__ import annotations

from torch import Tensor

from trimode.plugins.reference.norm_terms import norm_terms


def embed(input_ids: Tensor, table: Tensor) -> Tensor:
    """[B, S, H] from input_ids [B, S] and table [V, H]."""
    return table[input_ids]


def embed_for_norm(input_ids: Tensor, table: Tensor, next_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, and what the norm behind them reads. next_weight: [H]."""
    x = embed(input_ids, table)
    return (x, *norm_terms(x, next_weight))
