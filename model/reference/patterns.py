"""The two attention patterns of the family, and the KV cache.

Passes of different modes differ only in the attention pattern (technical report, arXiv 2607.05722). A pattern is a bool
mask [batch, step, past + step]: the keys that each query of the step attends to. Keys are in order of position, so the
committed prefix (``past``) comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [batch, kv_heads, length, head_dim]."""


def causal(batch: int, step: int, past: int, device: torch.device | None = None) -> Tensor:
    """Token i attends to the committed prefix and to tokens 0..i of its step: [batch, step, past + step] bool."""
    return torch.ones(step, past + step, dtype=torch.bool, device=device).tril(past).expand(batch, -1, -1)


def bidirectional(batch: int, step: int, past: int, device: torch.device | None = None) -> Tensor:
    """Every token attends to the committed prefix and to its whole step: [batch, step, past + step] bool."""
    return torch.ones(batch, step, past + step, dtype=torch.bool, device=device)


def blocks_of_text(starts: Tensor, step: int, past: int) -> Tensor:
    """One block of a text in each row of the batch; the past is the whole text: [blocks, step, past + step] bool.

    starts: [blocks] int64, the position of each block's first token. Every token attends to the text before its block
    and to its whole block.
    """
    visible = torch.ones(len(starts), step, past + step, dtype=torch.bool, device=starts.device)
    visible[:, :, :past] = (torch.arange(past, device=starts.device) < starts[:, None])[:, None]
    return visible


def crop(cache: list[KeyValue], length: int) -> list[KeyValue]:
    """The first ``length`` rows of every layer's keys and values."""
    return [(k[:, :, :length], v[:, :, :length]) for k, v in cache]
