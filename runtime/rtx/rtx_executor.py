"""Both TensorRT-RTX engines of an engine directory, as a GPU executor."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trimode.engine.manifest import Manifest
from trimode.engine.targets.rtx import RtxSection
from trimode.runtime.executor import BidirectionalStep, CausalStep, Step
from trimode.runtime.gpu.device import Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.plan_context import allocate_plan_memory
from trimode.runtime.gpu.plan_executor import PlanExecutor
from trimode.runtime.rtx.execution_contexts import RtxNetwork
from trimode.runtime.rtx.plan_loading import load_plans


class RtxExecutor(PlanExecutor):
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
        memory = allocate_plan_memory(device, manifest, largest)
        row_numbers = device.store(np.arange(limits.capacity), "the engines' inputs")
        networks: dict[type[Step], RtxNetwork] = {
            kind: RtxNetwork(device, plan, pool, memory, row_numbers)
            for kind, plan in ((CausalStep, plans.ar), (BidirectionalStep, plans.diffusion))
        }
        super().__init__(device, engine, manifest, pool, networks)
