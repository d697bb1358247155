"""Both TensorRT engines of an engine directory, as a GPU executor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from trimode.engine.files import POOL
from trimode.engine.manifest import Manifest
from trimode.engine.targets.tensorrt import TensorrtPlans
from trimode.model.step import COUNTERS
from trimode.runtime.executor import BidirectionalStep, CausalStep, Step
from trimode.runtime.gpu.device import Buffer, Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.plan_context import allocate_plan_memory
from trimode.runtime.gpu.plan_executor import PlanExecutor
from trimode.runtime.tensorrt.plan_loading import load_plans
from trimode.runtime.tensorrt.tensorrt_network import TensorrtNetwork

log = logging.getLogger(__name__)


class TensorrtExecutor(PlanExecutor):
    """Loads both plans onto the GPU with the driver's number ``ordinal``. Both read one copy of the weights.

    Raises TriModeError if the plans are not for this TensorRT, or the GPU has too little memory.
    """

    def __init__(self, engine: Path, manifest: Manifest, plans: TensorrtPlans, ordinal: int) -> None:
        limits = manifest.limits
        max_batch, _ = limits.largest_pass
        device = Device(ordinal)
        engines = load_plans(engine, plans)
        self._weights = device.store(np.memmap(engine / POOL, np.uint8, "r"), "the weights")
        pool = DeviceKvPool(device, manifest.model, manifest.precision.kv_cache, max_batch, limits.capacity)
        largest = max(loaded.device_memory_size_v2 for loaded in engines.values())
        memory = allocate_plan_memory(device, manifest, largest)
        addresses = {entry.name: self._weights.address + entry.offset for entry in manifest.pool}
        self._counters = _store_counters(device, list(engines.values()))
        if self._counters is not None:
            addresses |= dict.fromkeys((COUNTERS, f"{COUNTERS}_out"), self._counters.address)
        networks: dict[type[Step], TensorrtNetwork] = {
            kind: TensorrtNetwork(device, engines[name], pool, memory, addresses)
            for kind, name in ((CausalStep, "ar"), (BidirectionalStep, "diffusion"))
        }
        log.warning(
            "%s: no plan of target tensorrt was ever run on a GPU by its authors; compare its answers with target "
            "cuda's. TensorRT %s; %.1f MB of weights, %.1f MB of KV pool, %.1f MB of activations",
            engine,
            plans.tensorrt,
            self._weights.size / 1e6,
            pool.limit_bytes / 1e6,
            memory.scratch.size / 1e6,
        )
        super().__init__(device, engine, manifest, pool, networks)


def _store_counters(device: Device, engines: list[Any]) -> Buffer | None:
    """Zeros, if the plans have products that are split. Passes follow one another and leave zeros: one buffer serves
    both engines.
    """
    sizes = [
        loaded.get_tensor_shape(COUNTERS)[0]
        for loaded in engines
        if COUNTERS in {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    ]
    return device.store(np.zeros(max(sizes), np.int32), "counters") if sizes else None
