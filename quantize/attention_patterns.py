"""Both attention patterns over one text, as in decoding: AWQ is calibrated and evaluated on these passes.

Half of all passes of self-speculation are bidirectional over mask tokens. Statistics of causal text alone would miss
their activations. awq_lite weighs all passes equally, so one pass of each pattern per text gives both the same weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.model.reference.patterns import blocks_of_text, causal


class PatternLogits(NamedTuple):
    causal: Tensor  # [tokens, vocabulary]
    bidirectional: Tensor  # [blocks * block size, vocabulary]


@torch.no_grad()
def both_patterns(model: NemotronLabsDiffusionModel, tokens: list[int]) -> PatternLogits:
    """One causal pass over the text, and one bidirectional pass over its blocks, each after its own unmasked prefix.

    tokens: ids of one text, at least 2.
    """
    ids = torch.tensor([tokens], device=model.device)
    length = len(tokens)
    positions = torch.arange(length, device=model.device)
    hidden, cache = model.encoder(ids, positions[None], causal(1, length, 0, model.device))
    causal_logits = model.diffusion_head(hidden)[0]

    size = min(model.config.block_size, length - 1)
    starts = torch.arange(1, length - size + 1, size, device=model.device)
    block_positions = starts[:, None] + torch.arange(size, device=model.device)
    blocks = ids[0, block_positions]
    blocks[masked_positions(len(blocks), size).to(model.device)] = model.config.mask_token_id
    # All blocks in one batch: the past of each is the KV of the complete text.
    visible = blocks_of_text(starts, size, length)
    past = [(k.expand(len(blocks), -1, -1, -1), v.expand(len(blocks), -1, -1, -1)) for k, v in cache]
    hidden, _ = model.encoder(blocks, block_positions, visible, past)
    return PatternLogits(causal_logits, model.diffusion_head(hidden).flatten(0, 1))


def masked_positions(blocks: int, size: int) -> Tensor:
    """[blocks, size] bool. Even blocks are all masks after their first token; odd ones are partly denoised.

    The first token is never masked, the last always. Every call gives the same mask: AWQ runs the calibration twice and
    compares the runs.
    """
    generator = torch.Generator().manual_seed(0)
    masked_share = torch.rand(blocks, 1, generator=generator)
    masked = torch.rand(blocks, size, generator=generator) < masked_share
    masked[0::2] = True
    masked[:, -1] = True
    masked[:, 0] = False
    return masked
