"""Both engines of an engine directory for target ``cuda``, as a GPU executor."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from trimode.engine.files import POOL
from trimode.engine.kernel_library import KERNELS
from trimode.engine.launch_list import LaunchList
from trimode.engine.manifest import Manifest
from trimode.model.step import COUNTERS, ENGINES
from trimode.plugins.arena import arena_of
from trimode.runtime.cuda.cuda_network import CudaNetwork
from trimode.runtime.cuda.exchange import Exchange
from trimode.runtime.cuda.kernels import Kernels
from trimode.runtime.cuda.tactic_choice import tactic_times
from trimode.runtime.executor import BidirectionalStep, CausalStep, Step
from trimode.runtime.gpu.device import Buffer, Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_executor import GpuExecutor

log = logging.getLogger(__name__)

_KINDS: dict[str, type[Step]] = {"ar": CausalStep, "diffusion": BidirectionalStep}


class CudaExecutor(GpuExecutor):
    """Runs both engines over ``weights``, which hold the engine's weight pool on ``device``.

    engine: the engine directory, or a rank's folder in it; kernels are in the engine directory ``root``, which is
    ``engine`` by default. exchange: of a rank.

    weight_bytes, arena_bytes: device memory of the weights and of all temporary tensors. Raises TriModeError if the GPU
    cannot run the kernels or has too little memory.
    """

    def __init__(
        self,
        engine: Path,
        manifest: Manifest,
        device: Device,
        weights: Buffer,
        root: Path | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        limits, real = manifest.limits, manifest.precision.activations
        kernels = Kernels(device, (root or engine) / KERNELS)
        times = tactic_times(device, kernels.folder)
        launches = {_KINDS[name]: LaunchList.read(engine / name) for name, _ in ENGINES}
        pool = DeviceKvPool(
            device, manifest.model, manifest.precision.kv_cache, limits.largest_pass[0], limits.capacity
        )
        plans = arena_of(list(launches.values()), real, limits)
        self._weights = weights
        self._arena = device.allocate(max(plan.size for plan in plans), "activations")
        self.weight_bytes, self.arena_bytes = weights.size, self._arena.size
        # Passes follow one another, and each leaves the counters zero, so both engines share them.
        counters = [
            tensor.shape[0] for listed in launches.values() for tensor in listed.inputs if tensor.name == COUNTERS
        ]
        self._counters = device.store(np.zeros(max(map(int, counters), default=1), np.int32), "counters")
        addresses = {entry.name: weights.address + entry.offset for entry in manifest.pool}
        addresses[COUNTERS] = self._counters.address
        self._exchange = exchange
        of_ranks = {kind: exchange.addresses(listed) if exchange else {} for kind, listed in launches.items()}
        networks: dict[type[Step], CudaNetwork] = {
            kind: CudaNetwork(
                device, listed, kernels, pool, {**addresses, **of_ranks[kind]}, self._arena.address, plan, real, times
            )
            for (kind, listed), plan in zip(launches.items(), plans, strict=True)
        }
        log.info(
            "%s: %.1f MB of weights, %.1f MB of KV pool, %.1f MB of activations",
            engine,
            self.weight_bytes / 1e6,
            pool.limit_bytes / 1e6,
            self.arena_bytes / 1e6,
        )
        super().__init__(device, engine, manifest, pool, networks)


def load_cuda_executor(engine: Path, manifest: Manifest, ordinal: int) -> CudaExecutor:
    """Loads an engine onto the GPU with the driver's number ``ordinal``. Both engines read one copy of the weights."""
    device = Device(ordinal)
    weights = device.store(np.memmap(engine / POOL, np.uint8, "r"), "the weights")
    return CudaExecutor(engine, manifest, device, weights)
