"""Passes of one shape: every address bound, and the whole of it, copies included, one CUDA graph.

Inputs lie side by side in page-locked memory and on the device, so that they cross in one copy; so do the results. The
first pass of a shape runs as it is, which also lets TensorRT-RTX compile for the shape; then it is captured. A context
that was captured is never changed, so each shape has a context of its own; all of them work in the same memory, since
passes follow one another.

A speculation is two passes in one graph: what the first drafts is copied, on the device, to where the second reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorrt_rtx as trt
from numpy.typing import NDArray

from trimode.engine.manifest import Manifest
from trimode.engine.precision import NUMPY_TYPES
from trimode.model.step import cache_inputs, cache_outputs, cache_views
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Speculated
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.cuda import Buffer, Bytes, Device, Graph, Runs
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.rtx.plans import expect

ALIGNMENT = 256
WINDOW_ROWS = "window_rows"


class _Field(NamedTuple):
    """A tensor of the staging memory, ``offset`` bytes from its begin."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + int(np.prod(self.shape)) * self.dtype.itemsize


class Layout:
    """Where the inputs of a pass lie, and after them its results."""

    def __init__(self, bucket: Bucket, manifest: Manifest) -> None:
        batch, step, rows, top_k = bucket.batch, bucket.step, bucket.rows, manifest.limits.top_k
        self.inputs: dict[str, _Field] = {}
        self.results: dict[str, _Field] = {}
        self.end = 0
        for name in ("input_ids", "position_ids"):
            self._add(self.inputs, name, np.int64, batch, step)
        self._add(self.inputs, "write_indices", np.int64, batch)
        self._add(self.inputs, "logit_rows", np.int64, batch, rows)
        if bucket.kind is CausalStep:
            self._add(self.inputs, "block_mask", np.bool_, batch, step, step)
        else:
            self._add(self.inputs, "step_lengths", np.int64, batch)
            if manifest.adapter:
                self._add(self.inputs, "adapter_scale", NUMPY_TYPES[manifest.precision.kv_cache], batch)
        self.inputs_end = self.end
        self._add(self.results, "top_logits", np.float32, batch, rows, top_k)
        self.results_begin = self.results["top_logits"].offset
        self._add(self.results, "top_tokens", np.int64, batch, rows, top_k)
        self._add(self.results, "log_sum_exp", np.float32, batch, rows)

    def _add(self, fields: dict[str, _Field], name: str, dtype: Any, *shape: int) -> None:
        field = _Field(-(-self.end // ALIGNMENT) * ALIGNMENT, np.dtype(dtype), shape)
        fields[name] = field
        self.end = field.end


class Staging(NamedTuple):
    """Memory for one engine's inputs and results: on the device, and page-locked on the host."""

    device: Buffer
    locked: Buffer
    host: Bytes


class Constant(NamedTuple):
    """An input that never changes, on the device."""

    memory: Buffer
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineResources:
    """What the passes of one engine share: memory, the engine, and by name the inputs that never change."""

    device: Device
    manifest: Manifest
    pool: DeviceKvPool
    engine: Any
    tensors: frozenset[str]  # the engine's inputs and results, by name
    runtime_config: Any
    activations: Buffer
    staging: Staging
    row_numbers: Buffer  # 0, 1, ... to the capacity: a window is the beginning of it
    constants: dict[str, Constant]


class BoundPass:
    """One engine at one bucket."""

    def __init__(self, resources: EngineResources, bucket: Bucket) -> None:
        self._device = resources.device
        self._staging = resources.staging
        self._layout = Layout(bucket, resources.manifest)
        self._views = {name: self._view(field) for name, field in (self._layout.inputs | self._layout.results).items()}
        context = expect(
            resources.engine.create_execution_context(runtime_config=resources.runtime_config), "making a context"
        )
        context.set_device_memory(resources.activations.address, resources.activations.size)
        self._context = context
        for name, field in self._layout.inputs.items():
            self._bind(name, self._staging.device.address + field.offset, field.shape)
        for name, constant in resources.constants.items():
            self._bind(name, constant.memory.address, constant.shape)
        self._bind_pool(resources, bucket)
        for name, field in self._layout.results.items():
            expect(context.set_tensor_address(name, self._staging.device.address + field.offset), name)
        if missing := context.infer_shapes():
            raise RuntimeError(f"TensorRT-RTX: a pass lacks {', '.join(missing)}")

    def _bind_pool(self, resources: EngineResources, bucket: Bucket) -> None:
        """The slots, where the engine reads, writes, and reads again if it attends to the pool in place; if it attends
        to a window, its rows.
        """
        pool, layers = resources.pool, resources.manifest.model.num_hidden_layers
        names = zip(cache_inputs(layers), cache_outputs(layers), cache_views(layers), strict=True)
        for cache, (name, updated, view) in enumerate(names):
            rows = pool.address(cache, bucket.first_slot)
            self._bind(name, rows, (bucket.batch, *pool.shape))
            expect(self._context.set_tensor_address(updated, rows), updated)
            if view in resources.tensors:
                heads, capacity, head_dim = pool.shape
                # The plan takes keys as columns, [heads, head_dim, rows, 1], that lie in memory as rows do.
                columns = (bucket.batch * heads, head_dim, capacity, 1)
                self._bind(view, rows, columns if view.startswith("k_") else (bucket.batch, *pool.shape))
        if WINDOW_ROWS in resources.tensors:
            self._bind(WINDOW_ROWS, resources.row_numbers.address, (bucket.window,))

    def _bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        expect(self._context.set_input_shape(name, shape), f"the shape of {name}, {shape}")
        expect(self._context.set_tensor_address(name, address), f"the address of {name}")

    def _view(self, field: _Field) -> NDArray[Any]:
        return self._staging.host[field.offset : field.end].view(field.dtype).reshape(field.shape)

    def upload(self) -> None:
        self._device.upload(self._staging.device.address, self._staging.locked.address, self._layout.inputs_end)

    def execute(self) -> None:
        expect(self._context.execute_async_v3(self._device.stream), "running a pass")

    def download(self) -> None:
        begin, locked = self._layout.results_begin, self._staging.locked
        self._device.download(locked.address + begin, self._staging.device.address + begin, self._layout.end - begin)

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor lies on the device, and the bytes from one token's entry to the next one's."""
        field = (self._layout.inputs | self._layout.results)[name]
        per_token = int(np.prod(field.shape[2:])) * field.dtype.itemsize
        return self._staging.device.address + field.offset, per_token

    def put(self, step: CausalStep | BidirectionalStep) -> None:
        """The step's inputs, and about them padding: token 0, which sees itself and is seen by no other."""
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": step.input_ids,
            "position_ids": step.position_ids,
            "write_indices": step.write_indices,
            "logit_rows": step.logit_rows,
        }
        if isinstance(step, CausalStep):
            inputs["block_mask"] = step.block_mask
        else:
            inputs["step_lengths"] = step.step_lengths
            inputs["adapter_scale"] = step.adapter
        for name in self._layout.inputs:
            view, array = self._views[name], inputs[name]
            view[...] = 0
            view[tuple(map(slice, array.shape))] = array
        if isinstance(step, CausalStep):
            padding = np.arange(step.input_ids.shape[1], self._views["block_mask"].shape[1])
            self._views["block_mask"][:, padding, padding] = True

    def take(self, rows: int) -> Candidates:
        """What was found, copied: the next pass writes to the same memory."""
        logits, tokens, log_sum_exp = (self._views[name][:, :rows].copy() for name in self._layout.results)
        return Candidates(logits, tokens, log_sum_exp)


class CapturedWork:
    """Work of the stream that is captured once it has run."""

    def __init__(self, device: Device, enqueue: Callable[[], None]) -> None:
        self._device = device
        self._enqueue = enqueue
        self._graph: Graph | None = None

    def run(self) -> None:
        """To its end: one synchronisation."""
        if self._graph is not None:
            self._device.launch(self._graph)
            self._device.synchronize()
        else:
            self._enqueue()
            self._device.synchronize()
            self._graph = self._device.capture(self._enqueue)


class SinglePass:
    """One pass of one engine."""

    def __init__(self, device: Device, bound: BoundPass) -> None:
        self._bound = bound
        self._work = CapturedWork(device, self._enqueue)

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        self._bound.put(step)
        self._work.run()
        return self._bound.take(step.logit_rows.shape[1])

    def _enqueue(self) -> None:
        self._bound.upload()
        self._bound.execute()
        self._bound.download()


class Speculation:
    """A draft of whole blocks and the causal pass over what it drafted, with one synchronisation for both."""

    def __init__(self, device: Device, bucket: Bucket, draft: BoundPass, commit: BoundPass) -> None:
        self._device = device
        self._bucket = bucket
        self._draft = draft
        self._commit = commit
        self._work = CapturedWork(device, self._enqueue)

    def run(self, draft: BidirectionalStep, commit: CausalStep) -> Speculated:
        self._draft.put(draft)
        self._commit.put(commit)
        self._work.run()
        rows = draft.logit_rows.shape[1]
        return Speculated(self._draft.take(rows), self._commit.take(rows))

    def _enqueue(self) -> None:
        for bound in (self._draft, self._commit):
            bound.upload()
        self._draft.execute()
        self._hand_over()
        self._commit.execute()
        for bound in (self._draft, self._commit):
            bound.download()

    def _hand_over(self) -> None:
        """The best token of each row becomes the commit's input of that row; the first row keeps the pending token."""
        (found, pitch), (wanted, width) = self._draft.place("top_tokens"), self._commit.place("input_ids")
        step = self._bucket.step
        for sequence in range(self._bucket.batch if step > 1 else 0):
            first = sequence * step + 1
            source, to = Runs(found + first * pitch, pitch), Runs(wanted + first * width, width)
            self._device.copy_rows(to, source, width, step - 1)


def tensors_of(engine: Any) -> frozenset[str]:
    return frozenset(engine.get_tensor_name(index) for index in range(engine.num_io_tensors))


def runtime_config(engine: Any) -> Any:
    """How contexts of ``engine`` are made: over memory of ours, each compiled for its shape before it first runs."""
    config = expect(engine.create_runtime_config(), "making a runtime configuration")
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # A graph keeps the kernels it was captured with: they must be the ones made for the shape, not the stopgaps.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    # Contexts of one engine share what was compiled.
    expect(config.set_runtime_cache(expect(config.create_runtime_cache(), "making a cache")), "setting the cache")
    return config
