"""Target ``rtx``: steps to passes of two TensorRT-RTX engines over one KV pool in the GPU's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from trimode.common.errors import TriModeError
from trimode.engine.files import ADAPTER
from trimode.engine.manifest import Manifest
from trimode.engine.precision import NUMPY_TYPES
from trimode.engine.targets.rtx import RtxSection
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Speculated, Step
from trimode.runtime.gpu.buckets import Bucket, bucket_of
from trimode.runtime.gpu.cuda import Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.rtx.passes import (
    WINDOW_ROWS,
    BoundPass,
    Constant,
    EngineResources,
    Layout,
    SinglePass,
    Speculation,
    Staging,
    runtime_config,
    tensors_of,
)
from trimode.runtime.rtx.plans import load_plans


class RtxExecutor:
    """Loads both plans of an engine directory onto the GPU ``ordinal``.

    Raises TriModeError if they are not for it, or it has too little memory.
    """

    def __init__(self, engine: Path, manifest: Manifest, ordinal: int) -> None:
        self._capacity = manifest.limits.capacity
        self._max_batch, self._max_step = manifest.limits.largest_pass
        self._device = Device(ordinal)
        plans = load_plans(self._device, engine, manifest.section(RtxSection))
        self.weights = plans.weights
        self.pool = DeviceKvPool(
            self._device, manifest.model, manifest.precision.kv_cache, self._max_batch, self._capacity
        )
        both: dict[type[Step], Any] = {CausalStep: plans.ar, BidirectionalStep: plans.diffusion}
        activations = self._device.allocate(max(plan.device_memory_size_v2 for plan in both.values()), "activations")
        row_numbers = self._constant(np.arange(manifest.limits.capacity)).memory
        adapter = {
            name: self._constant(tensor.astype(NUMPY_TYPES[manifest.precision.kv_cache]))
            for name, tensor in (load_file(engine / ADAPTER) if manifest.adapter else {}).items()
        }
        self._resources = {
            kind: EngineResources(
                device=self._device,
                manifest=manifest,
                pool=self.pool,
                engine=plan,
                tensors=tensors_of(plan),
                runtime_config=runtime_config(plan),
                activations=activations,
                staging=self._staging(kind, manifest),
                row_numbers=row_numbers,
                constants=adapter if kind is BidirectionalStep else {},
            )
            for kind, plan in both.items()
        }
        self._bound: dict[Bucket, BoundPass] = {}
        self._passes: dict[Bucket, SinglePass] = {}
        self._speculations: dict[Bucket, Speculation] = {}

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        bucket = self._admit(step)
        if bucket not in self._passes:
            self._passes[bucket] = SinglePass(self._device, self._bind(bucket))
        return self._passes[bucket].run(step)

    def speculate(self, draft: BidirectionalStep) -> Speculated:
        commit, bucket = draft.verification(), self._admit(draft)
        if bucket not in self._speculations:
            bound = self._bind(bucket), self._bind(self._admit(commit))
            self._speculations[bucket] = Speculation(self._device, bucket, *bound)
        return self._speculations[bucket].run(draft, commit)

    def _admit(self, step: Step) -> Bucket:
        self._refuse(step)
        self._device.activate()
        windowed = WINDOW_ROWS in self._resources[type(step)].tensors
        return bucket_of(step, self._max_step, self._capacity, windowed)

    def _bind(self, bucket: Bucket) -> BoundPass:
        if bucket not in self._bound:
            self._bound[bucket] = BoundPass(self._resources[bucket.kind], bucket)
        return self._bound[bucket]

    def _refuse(self, step: Step) -> None:
        """What would write outside the step's slots."""
        if step.first_slot + step.batch > self.pool.slots:
            raise ValueError(f"slots {step.first_slot} to {step.first_slot + step.batch} of {self.pool.slots}")
        if step.input_ids.shape[1] > self._max_step:
            raise TriModeError(
                f"a step of {step.input_ids.shape[1]} tokens exceeds the engine's max_step of {self._max_step}; "
                "use a shorter block, or build with a larger --max-step"
            )
        self.pool.reserve(step.rows_written)

    def _constant(self, array: NDArray[Any]) -> Constant:
        memory = self._device.allocate(array.nbytes, "the engines' inputs")
        self._device.upload(memory.address, array.ctypes.data, array.nbytes)
        self._device.synchronize()
        return Constant(memory, array.shape)

    def _staging(self, kind: type[Step], manifest: Manifest) -> Staging:
        """Enough for the largest pass of an engine."""
        largest = Bucket(kind, 0, self._max_batch, self._max_step, self._max_step, 0)
        size = Layout(largest, manifest).end
        return Staging(self._device.allocate(size, "the engines' inputs"), *self._device.allocate_page_locked(size))
