"""Memory for the inputs and results of passes, on the device and page-locked on the host.

All inputs of a pass are adjacent, on both sides, so that one copy transfers them; so are its results. Passes follow one
another, so all passes of an engine share the same memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.engine.manifest import Manifest
from trimode.engine.precision import NUMPY_TYPES
from trimode.model.step import mask_words
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Step
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import Buffer, Bytes, Device
from trimode.runtime.gpu.gpu_network import DeviceTensor

ALIGNMENT = 256


class _Field(NamedTuple):
    """A tensor of the staging memory, ``offset`` bytes from its start."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + int(np.prod(self.shape)) * self.dtype.itemsize


class PassLayout:
    """Offsets of the inputs of a pass and, after them, of its results."""

    def __init__(self, bucket: Bucket, manifest: Manifest) -> None:
        batch, step, rows, top_k = bucket.batch, bucket.step, bucket.rows, bucket.top_k
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
                self._add(self.inputs, "adapter_scale", NUMPY_TYPES[manifest.precision.activations], batch)
        if bucket.masked:
            self._add(self.inputs, "token_mask", np.uint32, batch, rows, mask_words(manifest.model.vocab_size))
        if bucket.asked:
            self._add(self.inputs, "asked_ids", np.int64, batch, rows, bucket.asked)
        self.inputs_end = self.end
        self._add(self.results, "top_logits", np.float32, batch, rows, top_k)
        self.results_begin = self.results["top_logits"].offset
        self._add(self.results, "top_tokens", np.int64, batch, rows, top_k)
        self._add(self.results, "log_sum_exp", np.float32, batch, rows)
        if bucket.asked:
            self._add(self.results, "asked_logits", np.float32, batch, rows, bucket.asked)

    def _add(self, fields: dict[str, _Field], name: str, dtype: Any, *shape: int) -> None:
        field = _Field(-(-self.end // ALIGNMENT) * ALIGNMENT, np.dtype(dtype), shape)
        fields[name] = field
        self.end = field.end


class Staging(NamedTuple):
    """Memory for one engine's inputs and results: on the device, and page-locked on the host."""

    device: Buffer
    locked: Buffer
    host: Bytes


class PassMemory:
    """The inputs and results of the passes of one bucket, in the staging memory of their engine."""

    def __init__(self, device: Device, staging: Staging, bucket: Bucket, manifest: Manifest) -> None:
        self._device = device
        self._staging = staging
        self._layout = PassLayout(bucket, manifest)
        self._views = {name: self._view(field) for name, field in (self._layout.inputs | self._layout.results).items()}

    @property
    def inputs(self) -> dict[str, DeviceTensor]:
        return self._tensors(self._layout.inputs)

    @property
    def results(self) -> dict[str, DeviceTensor]:
        return self._tensors(self._layout.results)

    def upload(self) -> None:
        self._device.upload(self._staging.device.address, self._staging.locked.address, self._layout.inputs_end)

    def download(self) -> None:
        begin, locked = self._layout.results_begin, self._staging.locked
        self._device.download(locked.address + begin, self._staging.device.address + begin, self._layout.end - begin)

    def token_entries(self, name: str) -> tuple[int, int]:
        """A tensor's address on the device, and the distance in bytes between the entries of consecutive tokens."""
        field = (self._layout.inputs | self._layout.results)[name]
        return self._staging.device.address + field.offset, int(np.prod(field.shape[2:])) * field.dtype.itemsize

    def put(self, step: CausalStep | BidirectionalStep) -> None:
        """Copy the inputs; pad with token 0, which attends only to itself and is attended to by no other token."""
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
        if step.token_mask is not None:
            inputs["token_mask"] = step.token_mask
        if step.asked_ids is not None:
            inputs["asked_ids"] = step.asked_ids
        for name in self._layout.inputs:
            view, array = self._views[name], inputs[name]
            view[...] = 0
            view[tuple(map(slice, array.shape))] = array
        if isinstance(step, CausalStep):
            padding = np.arange(step.input_ids.shape[1], self._views["block_mask"].shape[1])
            self._views["block_mask"][:, padding, padding] = True

    def take(self, step: Step) -> Candidates:
        """A copy of the step's results without padding: the next pass overwrites this memory."""
        rows = step.logit_rows.shape[1]
        logits, tokens, log_sum_exp = (
            self._views[name][:, :rows].copy() for name in ("top_logits", "top_tokens", "log_sum_exp")
        )
        asked = self._views["asked_logits"][:, :rows, : step.asked].copy() if step.asked else None
        return Candidates(logits, tokens, log_sum_exp, asked)

    def _tensors(self, fields: dict[str, _Field]) -> dict[str, DeviceTensor]:
        address = self._staging.device.address
        return {name: DeviceTensor(address + field.offset, field.shape) for name, field in fields.items()}

    def _view(self, field: _Field) -> NDArray[Any]:
        return self._staging.host[field.offset : field.end].view(field.dtype).reshape(field.shape)
