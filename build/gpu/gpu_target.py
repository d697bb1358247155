"""Options and limits that GPU targets share."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimode.build.target import RequestedLimits, option
from trimode.engine.manifest import Limits
from trimode.model.config import ModelConfig

# A GPU holds the whole KV pool from the start, so the default is below the model's own limit.
DEFAULT_CAPACITY = 4096
# Candidates cross from the GPU to the host in every pass.
DEFAULT_TOP_K = 4


@dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """max_batch: sequences of a pass. max_step: tokens of a sequence in a pass."""

    max_batch: int = field(default=8, metadata=option("Most sequences in a pass."))
    max_step: int = field(default=256, metadata=option("Most tokens of a sequence in a pass."))

    def limits(self, config: ModelConfig, requested: RequestedLimits) -> Limits:
        return Limits(
            capacity=requested.capacity or min(config.max_position_embeddings, DEFAULT_CAPACITY),
            prefill_step=min(requested.prefill_step, self.max_step),
            top_k=min(requested.top_k or DEFAULT_TOP_K, config.vocab_size),
            max_batch=self.max_batch,
            max_step=self.max_step,
        )
