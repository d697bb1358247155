"""The seam between a GPU target and what all GPU targets share.

:class:`trimode.runtime.gpu.gpu_executor.GpuExecutor` owns the memory of inputs and results, and decides which passes
run. A target supplies one :class:`GpuNetwork` for the AR engine and one for the diffusion engine, which put a pass's
kernels on the stream: an execution context of TensorRT, or launches through the CUDA driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from trimode.runtime.gpu.buckets import Bucket

Enqueue = Callable[[], None]


class DeviceTensor(NamedTuple):
    """Where a tensor is stored on the device, and its shape in the pass."""

    address: int
    shape: tuple[int, ...]


class GpuNetwork(Protocol):
    """One engine of a target, over its weights, its scratch memory and the KV pool."""

    @property
    def windowed(self) -> bool:
        """Whether attention reads a window at the beginning of the KV pool, rather than the pool in place."""
        ...

    @property
    def returns_one(self) -> bool:
        """Whether a pass can return a single candidate of each row, rather than always the engine's top_k."""
        ...

    def bind(self, bucket: Bucket, inputs: Mapping[str, DeviceTensor], results: Mapping[str, DeviceTensor]) -> Enqueue:
        """Prepare the passes of a bucket; the returned function puts one of them on the device's stream.

        inputs, results: the step contract's tensors but for the KV pool, by name. ``token_mask`` is among them if the
        bucket is masked, and ``asked_ids`` and ``asked_logits`` if it has asked ids. Their addresses never change, nor
        do the KV pool's: the function may be captured in a CUDA graph, and must be safe to capture once it has run.
        """
        ...
