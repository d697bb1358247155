"""One rank of an engine for target ``cuda``, on a GPU of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trimode.engine.files import POOL, rank_folder
from trimode.engine.manifest import Manifest
from trimode.engine.targets.cuda import CudaSection
from trimode.model.shards import Shard
from trimode.runtime.cuda.cuda_executor import CudaExecutor
from trimode.runtime.cuda.exchange import Exchange
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep
from trimode.runtime.gpu.device import Device
from trimode.runtime.gpu.gpu_choice import choose_gpus
from trimode.runtime.ranks.group import Group
from trimode.runtime.ranks.merging import local_step


class CudaRankExecutor:
    """Runs the rank's part of each pass. Its candidates are those of its part of the vocabulary, counted from its first
    token. The sums of ranks are in the captured pass: no rank waits for another one on the host.

    engine: the engine directory, which holds the parts of all ranks.
    """

    def __init__(
        self, engine: Path, manifest: Manifest, group: Group, _threads: int, _kv_cache_bytes: int | None
    ) -> None:
        shard = Shard(group.rank, manifest.ranks)
        folder, self._tokens = engine / rank_folder(*shard), shard.part(manifest.model.vocab_size)
        self._top_k = manifest.limits.top_k
        part = manifest.model_copy(update={"model": shard.config(manifest.model)})
        gpus = choose_gpus(engine, "cuda", manifest.section(CudaSection).sms, manifest.ranks, portable=True)
        device = Device(gpus[group.rank])
        exchange = Exchange(device, group, part)
        weights = device.store(np.memmap(folder / POOL, np.uint8, "r"), "the weights")
        self._executor = CudaExecutor(folder, part, device, weights, engine, exchange)
        self.pool = self._executor.pool

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        """Raises TriModeError before the first sum for a step that the engine does not take, on every rank alike."""
        return self._executor.run(local_step(step, self._tokens, self._top_k))
