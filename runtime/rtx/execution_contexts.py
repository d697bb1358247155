"""Execution contexts of TensorRT-RTX: one for each bucket, with every address bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorrt_rtx as trt

from trimode.model.step import cache_views
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import Buffer, Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_network import DeviceTensor, Enqueue
from trimode.runtime.gpu.plan_context import PlanContext, PlanMemory
from trimode.runtime.rtx.plan_loading import LOG

WINDOW_ROWS = "window_rows"


class RtxNetwork:
    """One engine (``ICudaEngine``).

    row_numbers: 0, 1, ... up to the capacity, int64, on the device; a plan that attends to a window of n rows takes the
    first n of them as its input ``window_rows``.
    """

    def __init__(
        self, device: Device, engine: Any, pool: DeviceKvPool, memory: PlanMemory, row_numbers: Buffer
    ) -> None:
        self._device = device
        self._engine = engine
        self._pool = pool
        self._memory = memory
        self._row_numbers = row_numbers
        self._tensors = frozenset(engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
        self._config = _runtime_config(engine)

    @property
    def windowed(self) -> bool:
        return WINDOW_ROWS in self._tensors

    @property
    def returns_one(self) -> bool:
        return False  # the number is a constant of the plan

    def bind(self, bucket: Bucket, inputs: Mapping[str, DeviceTensor], results: Mapping[str, DeviceTensor]) -> Enqueue:
        made = LOG.expect(self._engine.create_execution_context(runtime_config=self._config), "making a context")
        context = PlanContext(made, LOG, self._memory)
        context.bind_step(bucket, inputs, results)
        context.bind_pool(self._pool, bucket.first_slot, bucket.batch)
        self._bind_views(context, bucket)
        if self.windowed:
            context.bind_input(WINDOW_ROWS, DeviceTensor(self._row_numbers.address, (bucket.window,)))
        return context.enqueue(self._device.stream)

    def _bind_views(self, context: PlanContext, bucket: Bucket) -> None:
        """Bind the batch's slots as views to read, for a plan that attends to them in place."""
        heads, capacity, head_dim = self._pool.shape
        for cache, view in enumerate(cache_views(self._pool.layers)):
            if view in self._tensors:
                address = self._pool.address(cache, bucket.first_slot)
                # The plan takes keys as columns, [heads, head_dim, rows, 1], which have the same bytes as rows.
                columns, rows = (bucket.batch * heads, head_dim, capacity, 1), (bucket.batch, *self._pool.shape)
                context.bind_input(view, DeviceTensor(address, columns if view.startswith("k_") else rows))


def _runtime_config(engine: Any) -> Any:
    """The configuration of an engine's contexts: scratch memory from outside, kernels compiled before the first run."""
    config = LOG.expect(engine.create_runtime_config(), "making a runtime configuration")
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # A graph keeps the kernels it was captured with, so they must be those compiled for the shape, not the fallbacks.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    # Contexts of one engine share what was compiled.
    cache = LOG.expect(config.create_runtime_cache(), "making a cache")
    LOG.expect(config.set_runtime_cache(cache), "setting the cache")
    return config
