"""Execution contexts of TensorRT: one for each bucket, with every address bound.

TensorRT leaks a module of every plugin's kernel each time that a context changes its shapes
(https://github.com/NVIDIA/TensorRT/issues/4849), so no context ever does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorrt as trt

from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_network import DeviceTensor, Enqueue
from trimode.runtime.gpu.plan_context import PlanContext, PlanMemory
from trimode.runtime.tensorrt.plan_loading import LOG


class TensorrtNetwork:
    """One engine (``ICudaEngine``). fixed: addresses of the weights and of the counters, by name."""

    windowed = False
    returns_one = False  # the number is a constant of the plan

    def __init__(
        self, device: Device, engine: Any, pool: DeviceKvPool, memory: PlanMemory, fixed: Mapping[str, int]
    ) -> None:
        self._device = device
        self._engine = engine
        self._pool = pool
        self._memory = memory
        names = (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
        self._fixed = {name: fixed[name] for name in names if name in fixed}

    def bind(self, bucket: Bucket, inputs: Mapping[str, DeviceTensor], results: Mapping[str, DeviceTensor]) -> Enqueue:
        outside = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        made = LOG.expect(self._engine.create_execution_context(outside), "making a context")
        profile, stream = self._profile(bucket.step), self._device.stream
        LOG.expect(made.set_optimization_profile_async(profile, stream), f"choosing profile {profile}")
        context = PlanContext(made, LOG, self._memory)
        for name, address in self._fixed.items():
            context.bind_address(name, address)
        context.bind_step(bucket, inputs, results)
        context.bind_pool(self._pool, bucket.first_slot, bucket.batch)
        return context.enqueue(stream)

    def _profile(self, step: int) -> int:
        """The optimisation profile for steps of this length. Each length belongs to one."""
        for profile in range(self._engine.num_optimization_profiles):
            least, _, most = self._engine.get_tensor_profile_shape("input_ids", profile)
            if least[1] <= step <= most[1]:
                return profile
        raise RuntimeError(f"the plan has no profile for steps of {step} tokens")
