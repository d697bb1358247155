"""AWQ is calibrated on the same passes that decoding runs."""

from __future__ import annotations

import pytest
import torch

from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.patterns import bidirectional, causal, crop
from trimode.quantize.attention_patterns import both_patterns, masked_positions


@pytest.mark.parametrize("length", [29, 17, 9, 5, 2])
def test_the_logits_are_those_of_decodings_passes(source: Checkpoint, length: int) -> None:
    """Block by block over a cropped cache, as the reference decodes, against all blocks in one batch."""
    model = load_reference(source, adapter=False)
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    found = both_patterns(model, tokens)

    ids = torch.tensor([tokens])
    with torch.no_grad():
        hidden, cache = model.encoder(ids, torch.arange(length)[None], causal(1, length, 0))
        torch.testing.assert_close(found.causal, model.diffusion_head(hidden)[0])
        size = min(model.config.block_size, length - 1)
        starts = range(1, length - size + 1, size)
        masked = masked_positions(len(starts), size)
        expected = []
        for row, start in enumerate(starts):
            block = ids[:, start : start + size].masked_fill(masked[row], model.config.mask_token_id)
            positions = torch.arange(start, start + size)[None]
            hidden, _ = model.encoder(block, positions, bidirectional(1, size, start), crop(cache, start))
            expected.append(model.diffusion_head(hidden)[0])
    torch.testing.assert_close(found.bidirectional, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_blocks_are_fresh_and_partly_denoised_in_turn() -> None:
    masked = masked_positions(64, 32)
    assert not masked[:, 0].any()
    assert masked[0::2, 1:].all()
    shares = masked[1::2, 1:].float().mean(1)
    assert shares.min() < 0.2
    assert shares.max() > 0.8
    assert torch.equal(masked, masked_positions(64, 32))
