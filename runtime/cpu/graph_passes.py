"""What the executors of target ``cpu`` share: their KV pool, and how a step becomes inputs of the graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.engine.manifest import Manifest
from trimode.engine.targets.cpu import CpuSection
from trimode.model.config import ModelConfig
from trimode.model.step import mask_words
from trimode.runtime.cpu.even_rows import with_even_rows
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Step
from trimode.runtime.kv.host_kv_pool import KvPool

FOLDERS: dict[type[Step], str] = {CausalStep: "ar", BidirectionalStep: "diffusion"}

Arrays = dict[str, NDArray[Any]]


class GraphPasses(ABC):
    """Runs steps, padded where the engine needs it, over a KV pool in host memory.

    model: of the whole engine, or of one rank.
    """

    def __init__(self, manifest: Manifest, model: ModelConfig, kv_cache_bytes: int | None) -> None:
        self._pads_rows = manifest.section(CpuSection).activations == "int8"
        self.pool = KvPool(
            model.num_hidden_layers,
            model.num_key_value_heads,
            model.head_dim,
            manifest.limits.capacity,
            kv_cache_bytes,
            spare_rows=1 if self._pads_rows else 0,
        )
        self._top_k = min(manifest.limits.top_k, model.vocab_size)
        self._mask_bytes = 4 * mask_words(model.vocab_size)
        self._has_adapter = manifest.adapter is not None

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        """Raises TriModeError before anything is computed if the KV pool has no room."""
        self.pool.reserve(step.rows_written)
        if self._pads_rows:
            return self._run(with_even_rows(step)).first_rows(step.logit_rows.shape[1])
        return self._run(step)

    @abstractmethod
    def _run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        """One pass, without padding."""

    def _candidates(self, step: CausalStep | BidirectionalStep) -> int:
        """How many of each row a pass returns."""
        return min(step.top_k or self._top_k, self._top_k)

    def _inputs(self, step: CausalStep | BidirectionalStep) -> Arrays:
        """The graph's inputs, without KV caches and adapter. Without a token mask or asked ids, theirs are empty."""
        inputs: Arrays = {
            "input_ids": step.input_ids,
            "position_ids": step.position_ids,
            "write_indices": step.write_indices,
            "logit_rows": step.logit_rows,
            "top_k": np.array([self._candidates(step)]),
            "token_mask": np.empty((step.batch, 0, self._mask_bytes), np.uint8),
            "asked_ids": np.empty((*step.logit_rows.shape, 0), np.int64),
        }
        if isinstance(step, CausalStep):
            inputs["block_mask"] = step.block_mask
        else:
            inputs["step_lengths"] = step.step_lengths
            if self._has_adapter:
                inputs["adapter_scale"] = step.adapter.astype(np.float32)
        if step.token_mask is not None:
            # The graph takes words as bytes, the lowest first.
            inputs["token_mask"] = np.ascontiguousarray(step.token_mask, "<u4").view(np.uint8)
        if step.asked_ids is not None:
            inputs["asked_ids"] = step.asked_ids
        return inputs
