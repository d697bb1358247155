"""Execution contexts of TensorRT-RTX: one for each bucket, with every address bound.

A context that was captured in a CUDA graph must not change, so each bucket has its own. Passes follow one another, so
all contexts use the same scratch memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import tensorrt_rtx as trt

from trimode.model.step import cache_inputs, cache_outputs, cache_views
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import Buffer, Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_network import DeviceTensor, Enqueue
from trimode.runtime.rtx.plan_loading import expect

WINDOW_ROWS = "window_rows"
# Of a pass without token mask and asked ids: both inputs, the results of masked rows, and the asked logits.
MOST_UNUSED = 6


class RtxNetwork:
    """One engine (``ICudaEngine``).

    mask_bytes: size of a row of ``token_mask``. scratch: memory for activations. unused: memory for
    :data:`MOST_UNUSED` tensors that a pass does not use, but that TensorRT needs addresses for. row_numbers: 0, 1, ...
    up to the capacity, int64, on the device; a plan that attends to a window of n rows takes the first n of them as its
    input ``window_rows``.
    """

    def __init__(
        self,
        device: Device,
        engine: Any,
        pool: DeviceKvPool,
        mask_bytes: int,
        scratch: Buffer,
        unused: Buffer,
        row_numbers: Buffer,
    ) -> None:
        self._device = device
        self._engine = engine
        self._pool = pool
        self._mask_bytes = mask_bytes
        self._scratch = scratch
        self._unused = unused
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
        context = expect(self._engine.create_execution_context(runtime_config=self._config), "making a context")
        context.set_device_memory(self._scratch.address, self._scratch.size)
        unused = iter(
            range(self._unused.address, self._unused.address + self._unused.size, self._unused.size // MOST_UNUSED)
        )
        optional = self._optional_inputs(bucket, inputs, unused)
        for name, tensor in {**inputs, **optional}.items():
            _bind_input(context, name, tensor)
        self._bind_pool(context, bucket)
        # Rows with a token mask have results of their own; the others' are computed as well.
        wanted, other = ("masked_", "") if bucket.masked else ("", "masked_")
        for name in ("top_logits", "top_tokens", "log_sum_exp"):
            expect(context.set_tensor_address(wanted + name, results[name].address), name)
            expect(context.set_tensor_address(other + name, next(unused)), name)
        asked_logits = results["asked_logits"].address if bucket.asked else next(unused)
        expect(context.set_tensor_address("asked_logits", asked_logits), "asked_logits")
        if missing := context.infer_shapes():
            raise RuntimeError(f"TensorRT-RTX: a pass lacks {', '.join(missing)}")

        def enqueue() -> None:
            expect(context.execute_async_v3(self._device.stream), "running a pass")

        return enqueue

    def _optional_inputs(
        self, bucket: Bucket, inputs: Mapping[str, DeviceTensor], unused: Iterator[int]
    ) -> dict[str, DeviceTensor]:
        """``token_mask`` and ``asked_ids``, empty for passes without them. The plan takes the mask's words as bytes."""
        if bucket.masked:
            address, (batch, rows, _) = inputs["token_mask"]
            mask = DeviceTensor(address, (batch, rows, self._mask_bytes))
        else:
            mask = DeviceTensor(next(unused), (bucket.batch, 0, self._mask_bytes))
        if bucket.asked:
            return {"token_mask": mask}
        return {"token_mask": mask, "asked_ids": DeviceTensor(next(unused), (bucket.batch, bucket.rows, 0))}

    def _bind_pool(self, context: Any, bucket: Bucket) -> None:
        """Bind the batch's slots as caches to write and, for a plan that attends to them in place, as views to read."""
        pool = self._pool
        heads, capacity, head_dim = pool.shape
        names = zip(cache_inputs(pool.layers), cache_outputs(pool.layers), cache_views(pool.layers), strict=True)
        for cache, (name, updated, view) in enumerate(names):
            rows = DeviceTensor(pool.address(cache, bucket.first_slot), (bucket.batch, *pool.shape))
            _bind_input(context, name, rows)
            expect(context.set_tensor_address(updated, rows.address), updated)
            if view in self._tensors:
                # The plan takes keys as columns, [heads, head_dim, rows, 1], which have the same bytes as rows.
                columns = DeviceTensor(rows.address, (bucket.batch * heads, head_dim, capacity, 1))
                _bind_input(context, view, columns if view.startswith("k_") else rows)
        if self.windowed:
            _bind_input(context, WINDOW_ROWS, DeviceTensor(self._row_numbers.address, (bucket.window,)))


def _bind_input(context: Any, name: str, tensor: DeviceTensor) -> None:
    expect(context.set_input_shape(name, tensor.shape), f"the shape of {name}, {tensor.shape}")
    expect(context.set_tensor_address(name, tensor.address), f"the address of {name}")


def _runtime_config(engine: Any) -> Any:
    """The configuration of an engine's contexts: scratch memory from outside, kernels compiled before the first run."""
    config = expect(engine.create_runtime_config(), "making a runtime configuration")
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # A graph keeps the kernels it was captured with, so they must be those compiled for the shape, not the fallbacks.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    # Contexts of one engine share what was compiled.
    expect(config.set_runtime_cache(expect(config.create_runtime_cache(), "making a cache")), "setting the cache")
    return config
