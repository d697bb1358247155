"""One execution context of a plan, with the addresses of one bucket. TensorRT and TensorRT-RTX have the same API.

A context that was captured in a CUDA graph must not change, so each bucket has its own. Passes follow one another, so
all contexts of both engines use the same scratch memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from trimode.engine.manifest import Manifest
from trimode.engine.plan_file import MOST_MASKED_ROWS
from trimode.model.step import cache_inputs, cache_outputs, mask_words
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import Buffer, Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_network import DeviceTensor, Enqueue
from trimode.runtime.gpu.pass_memory import ALIGNMENT
from trimode.runtime.gpu.plan_log import LastErrorLog

# Of a pass without token mask and asked ids: both inputs, the results of masked rows, and the asked logits.
MOST_UNUSED = 6


class PlanMemory(NamedTuple):
    """Device memory that all contexts share. scratch: for activations. unused: for :data:`MOST_UNUSED` tensors that a
    pass does not use, but that TensorRT needs addresses for. mask_bytes: size of a row of ``token_mask``.
    """

    scratch: Buffer
    unused: Buffer
    mask_bytes: int


def allocate_plan_memory(device: Device, manifest: Manifest, activations: int) -> PlanMemory:
    """activations: bytes of the larger engine's."""
    limits = manifest.limits
    max_batch, max_step = limits.largest_pass
    # The largest result that a pass without a mask does not use is `masked_top_tokens`.
    size = max_batch * min(MOST_MASKED_ROWS, max_step) * limits.top_k * np.dtype(np.int64).itemsize
    return PlanMemory(
        device.allocate(activations, "activations"),
        device.allocate(MOST_UNUSED * -(-size // ALIGNMENT) * ALIGNMENT, "the engines' results"),
        4 * mask_words(manifest.model.vocab_size),
    )


class PlanContext:
    """context: an ``IExecutionContext`` of the library whose log is ``log``; it allocates no memory itself."""

    def __init__(self, context: Any, log: LastErrorLog, memory: PlanMemory) -> None:
        self._context = context
        self._log = log
        self._memory = memory
        context.set_device_memory(memory.scratch.address, memory.scratch.size)

    def bind_input(self, name: str, tensor: DeviceTensor) -> None:
        shaped = self._context.set_input_shape(name, tensor.shape)
        self._log.expect(shaped, f"the shape of {name}, {tensor.shape}")
        self.bind_address(name, tensor.address)

    def bind_address(self, name: str, address: int) -> None:
        """Bind an output, or an input of fixed shape."""
        self._log.expect(self._context.set_tensor_address(name, address), f"the address of {name}")

    def bind_step(
        self, bucket: Bucket, inputs: Mapping[str, DeviceTensor], results: Mapping[str, DeviceTensor]
    ) -> None:
        """Bind the step contract's tensors but for the KV pool."""
        memory = self._memory.unused
        unused = iter(range(memory.address, memory.address + memory.size, memory.size // MOST_UNUSED))
        optional = self._optional_inputs(bucket, inputs, unused)
        for name, tensor in {**inputs, **optional}.items():
            self.bind_input(name, tensor)
        # Rows with a token mask have results of their own; the others' are computed as well.
        wanted, other = ("masked_", "") if bucket.masked else ("", "masked_")
        for name in ("top_logits", "top_tokens", "log_sum_exp"):
            self.bind_address(wanted + name, results[name].address)
            self.bind_address(other + name, next(unused))
        self.bind_address("asked_logits", results["asked_logits"].address if bucket.asked else next(unused))

    def bind_pool(self, pool: DeviceKvPool, first_slot: int, batch: int) -> None:
        """Bind the batch's slots as the caches, which are written in place."""
        names = zip(cache_inputs(pool.layers), cache_outputs(pool.layers), strict=True)
        for cache, (name, updated) in enumerate(names):
            address = pool.address(cache, first_slot)
            self.bind_input(name, DeviceTensor(address, (batch, *pool.shape)))
            self.bind_address(updated, address)

    def enqueue(self, stream: int) -> Enqueue:
        """The function that puts a pass on the stream. Raises RuntimeError if the pass lacks an input."""
        if missing := self._context.infer_shapes():
            raise RuntimeError(f"{self._log.library}: a pass lacks {', '.join(missing)}")

        def enqueue() -> None:
            self._log.expect(self._context.execute_async_v3(stream), "running a pass")

        return enqueue

    def _optional_inputs(
        self, bucket: Bucket, inputs: Mapping[str, DeviceTensor], unused: Iterator[int]
    ) -> dict[str, DeviceTensor]:
        """``token_mask`` and ``asked_ids``, empty for passes without them. The plan takes the mask's words as bytes."""
        if bucket.masked:
            address, (batch, rows, _) = inputs["token_mask"]
            mask = DeviceTensor(address, (batch, rows, self._memory.mask_bytes))
        else:
            mask = DeviceTensor(next(unused), (bucket.batch, 0, self._memory.mask_bytes))
        if bucket.asked:
            return {"token_mask": mask}
        return {"token_mask": mask, "asked_ids": DeviceTensor(next(unused), (bucket.batch, bucket.rows, 0))}
