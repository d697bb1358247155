"""Both TensorRT-RTX engines of an engine directory, as a GPU executor."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trimode.common.errors import TriModeError
from trimode.engine.manifest import Limits, Manifest
from trimode.engine.plan_file import MOST_ASKED, MOST_MASKED_ROWS
from trimode.engine.targets.rtx import RtxSection
from trimode.model.step import mask_words
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Step, joined_rows, some_rows
from trimode.runtime.gpu.device import Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_executor import GpuExecutor
from trimode.runtime.gpu.pass_memory import ALIGNMENT
from trimode.runtime.rtx.execution_contexts import MOST_UNUSED, RtxNetwork
from trimode.runtime.rtx.plan_loading import load_plans


class RtxExecutor(GpuExecutor):
    """Loads both plans onto the GPU with the driver's number ``ordinal``. ``weights``: where their weights are stored.

    Raises TriModeError if the plans are not for this GPU, or it has too little memory.
    """

    def __init__(self, engine: Path, manifest: Manifest, ordinal: int) -> None:
        device = Device(ordinal)
        plans = load_plans(device, engine, manifest.section(RtxSection))
        self.weights = plans.weights
        limits = manifest.limits
        max_batch, _ = limits.largest_pass
        pool = DeviceKvPool(device, manifest.model, manifest.precision.kv_cache, max_batch, limits.capacity)
        largest = max(plan.device_memory_size_v2 for plan in (plans.ar, plans.diffusion))
        scratch = device.allocate(largest, "activations")
        row_numbers = device.store(np.arange(limits.capacity), "the engines' inputs")
        mask_bytes = 4 * mask_words(manifest.model.vocab_size)
        unused = device.allocate(MOST_UNUSED * _largest_unused(limits), "the engines' results")
        networks: dict[type[Step], RtxNetwork] = {
            kind: RtxNetwork(device, plan, pool, mask_bytes, scratch, unused, row_numbers)
            for kind, plan in ((CausalStep, plans.ar), (BidirectionalStep, plans.diffusion))
        }
        super().__init__(device, engine, manifest, pool, networks)

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        """Run one pass, or as many as the plans need for the rows of a token mask: each writes the same KV rows."""
        if step.asked > MOST_ASKED:
            raise TriModeError(f"{step.asked} asked ids of a row; plans of target rtx take {MOST_ASKED}")
        rows = step.logit_rows.shape[1]
        if step.token_mask is None or rows <= MOST_MASKED_ROWS:
            return super().run(step)
        starts = range(0, rows, MOST_MASKED_ROWS)
        return joined_rows(
            [super(RtxExecutor, self).run(some_rows(step, slice(at, at + MOST_MASKED_ROWS))) for at in starts]
        )


def _largest_unused(limits: Limits) -> int:
    """Bytes of the largest result that a masked pass does not use, ``top_tokens``, aligned."""
    max_batch, max_step = limits.largest_pass
    size = max_batch * min(MOST_MASKED_ROWS, max_step) * limits.top_k * np.dtype(np.int64).itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT
