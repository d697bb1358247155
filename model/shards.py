"""Tensor parallelism: how the network is divided among N ranks, which are processes that run each pass together.

| part of the network | a rank holds |
|---|---|
| attention | 1/N of the KV heads, with their query heads: rows of q, k and v, columns of o |
| MLP | 1/N of the intermediate channels: rows of gate and up, columns of down |
| head | 1/N of the vocabulary: rows of the head |
| draft adapter | the rows of its A's transpose that belong to the rank's query heads, and the whole of B |
| embedding, norms | everything |

The products of o and down, and the adapter's, are partial sums. Ranks add them up twice in each layer, in the order of
ranks, so that the bits of the sum depend neither on timing nor on the rank.
"""

from __future__ import annotations

from typing import NamedTuple

from trimode.model.config import ModelConfig


class Shard(NamedTuple):
    """The part of the network that rank ``rank`` of ``ranks`` holds."""

    rank: int
    ranks: int

    def part(self, size: int) -> slice:
        """The rank's part of a dimension, of which every rank has as much. Raises ValueError if it cannot."""
        if size % self.ranks:
            raise ValueError(f"{size} is not a multiple of {self.ranks} ranks")
        width = size // self.ranks
        return slice(self.rank * width, (self.rank + 1) * width)

    def config(self, config: ModelConfig) -> ModelConfig:
        """The sizes of the rank's part. Its vocabulary begins with the rank's first token, and ``mask_token_id`` counts
        from there; on ranks that do not hold the mask token, it is -1.
        """
        tokens = self.part(config.vocab_size)
        holds_mask = tokens.start <= config.mask_token_id < tokens.stop
        return config.model_copy(
            update={
                "num_attention_heads": config.num_attention_heads // self.ranks,
                "num_key_value_heads": config.num_key_value_heads // self.ranks,
                "intermediate_size": config.intermediate_size // self.ranks,
                "vocab_size": tokens.stop - tokens.start,
                "mask_token_id": config.mask_token_id - tokens.start if holds_mask else -1,
            }
        )


WHOLE = Shard(0, 1)
