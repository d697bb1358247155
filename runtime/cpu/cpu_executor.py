"""Target ``cpu``: two ONNX Runtime sessions over one mapped weight pool, bound to the KV pool's own memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from safetensors.numpy import load_file

from trimode.common.machine import usable_cpus
from trimode.engine.files import ADAPTER
from trimode.engine.manifest import Manifest
from trimode.engine.targets.cpu import CpuSection
from trimode.model.step import cache_inputs, cache_outputs, mask_words
from trimode.runtime.cpu.even_rows import with_even_rows
from trimode.runtime.cpu.sessions import folder_of_pool, load_session, refuse_foreign_layout
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Step
from trimode.runtime.kv.host_kv_pool import KvPool

log = logging.getLogger(__name__)

FOLDERS: dict[type[Step], str] = {CausalStep: "ar", BidirectionalStep: "diffusion"}
# Shapes of passes whose memory is kept.
_MOST_SHAPES = 256

_Arrays = dict[str, NDArray[Any]]


class _Results(NamedTuple):
    top_logits: NDArray[np.float32]
    top_tokens: NDArray[np.int64]
    log_sum_exp: NDArray[np.float32]
    asked_logits: NDArray[np.float32]


class _ShapeMemory(NamedTuple):
    """Inputs and results of passes of one shape, as arrays and as ONNX Runtime's values of the same memory."""

    inputs: _Arrays
    results: _Results
    input_values: dict[str, ort.OrtValue]
    result_values: dict[str, ort.OrtValue]


@dataclass
class _Binding:
    """A session's binding of some of the pool's slots, and of the memory of one shape of pass."""

    session_binding: ort.IOBinding
    memory: _ShapeMemory | None = None

    def bind(self, memory: _ShapeMemory) -> None:
        if self.memory is memory:  # true for most passes; binding takes longer than the rest of the call
            return
        for name, value in memory.input_values.items():
            self.session_binding.bind_ortvalue_input(name, value)
        for name, value in memory.result_values.items():
            self.session_binding.bind_ortvalue_output(name, value)
        self.memory = memory


class CpuExecutor:
    """Loads ``ar/`` and ``diffusion/`` of an engine directory; raises TriModeError if they are not for this machine."""

    def __init__(
        self, engine: Path, manifest: Manifest, threads: int | None = None, kv_cache_bytes: int | None = None
    ) -> None:
        refuse_foreign_layout(engine, manifest)
        model = manifest.model
        self._pads_rows = manifest.section(CpuSection).activations == "int8"
        self.pool = KvPool(
            model.num_hidden_layers,
            model.num_key_value_heads,
            model.head_dim,
            manifest.limits.capacity,
            kv_cache_bytes,
            spare_rows=1 if self._pads_rows else 0,
        )
        self._top_k = manifest.limits.top_k
        self._mask_bytes = 4 * mask_words(model.vocab_size)
        self._caches = list(
            zip(cache_inputs(model.num_hidden_layers), cache_outputs(model.num_hidden_layers), strict=True)
        )
        self._adapter = load_file(engine / ADAPTER) if manifest.adapter else {}
        usable = usable_cpus()
        if threads is not None and threads > usable:
            log.warning("threads is %d, but this process may use %d CPUs; more threads only wait", threads, usable)
        self.threads = min(threads or usable, usable)
        (model_file,) = manifest.target.engine_files
        with folder_of_pool(engine) as weights:
            self._sessions = {
                kind: load_session(engine / folder / model_file, weights, self.threads)
                for kind, folder in FOLDERS.items()
            }
        self._memories: dict[tuple[int, ...], _ShapeMemory] = {}
        # A binding of the caches is valid until the pool is reallocated.
        self._bindings: dict[tuple[type[Step], int, int], _Binding] = {}
        self._bound_generation = self.pool.generation

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        self.pool.reserve(step.rows_written)
        if self._pads_rows:
            return self._run(with_even_rows(step)).first_rows(step.logit_rows.shape[1])
        return self._run(step)

    def _run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        memory, binding = self._memory(step), self._binding(step)
        for name, array in self._inputs(step).items():
            memory.inputs[name][...] = array
        binding.bind(memory)
        self._sessions[type(step)].run_with_iobinding(binding.session_binding)
        logits, tokens, log_sum_exp, asked = memory.results
        return Candidates(
            logits.copy(), tokens.copy(), log_sum_exp.copy(), None if step.asked_ids is None else asked.copy()
        )

    def _inputs(self, step: CausalStep | BidirectionalStep) -> _Arrays:
        inputs: _Arrays = {
            "input_ids": step.input_ids,
            "position_ids": step.position_ids,
            "write_indices": step.write_indices,
            "logit_rows": step.logit_rows,
        }
        if isinstance(step, CausalStep):
            inputs["block_mask"] = step.block_mask
        else:
            inputs["step_lengths"] = step.step_lengths
            if self._adapter:
                inputs["adapter_scale"] = step.adapter
        if step.token_mask is not None:
            # The graph takes words as bytes, the lowest first.
            inputs["token_mask"] = np.ascontiguousarray(step.token_mask, "<u4").view(np.uint8)
        if step.asked_ids is not None:
            inputs["asked_ids"] = step.asked_ids
        return inputs

    def _memory(self, step: CausalStep | BidirectionalStep) -> _ShapeMemory:
        top_k = min(step.top_k or self._top_k, self._top_k)
        batch_and_rows = step.logit_rows.shape
        masked = step.token_mask is not None
        key = (isinstance(step, CausalStep), *step.input_ids.shape, *batch_and_rows, top_k, masked, step.asked)
        if key not in self._memories:
            if len(self._memories) == _MOST_SHAPES:
                self._memories.clear()
            inputs: _Arrays = {name: np.empty(array.shape, array.dtype) for name, array in self._inputs(step).items()}
            if "adapter_scale" in inputs:
                inputs["adapter_scale"] = np.empty(step.batch, np.float32)
            inputs["top_k"] = np.array([top_k])
            # Without a token mask or asked ids, these inputs are empty.
            inputs.setdefault("token_mask", np.empty((step.batch, 0, self._mask_bytes), np.uint8))
            inputs.setdefault("asked_ids", np.empty((*batch_and_rows, 0), np.int64))
            results = _Results(
                np.empty((*batch_and_rows, top_k), np.float32),
                np.empty((*batch_and_rows, top_k), np.int64),
                np.empty(batch_and_rows, np.float32),
                np.empty((*batch_and_rows, step.asked), np.float32),
            )
            self._memories[key] = _ShapeMemory(inputs, results, _values(inputs), _values(results._asdict()))
        return self._memories[key]

    def _binding(self, step: Step) -> _Binding:
        """The binding of the step's slots, with the same addresses for the caches as inputs and as outputs."""
        if self._bound_generation != self.pool.generation:
            self._bindings.clear()
            self._bound_generation = self.pool.generation
        key = (type(step), step.first_slot, step.batch)
        if key not in self._bindings:
            binding = self._sessions[type(step)].io_binding()
            for (name, updated), buffer in zip(self._caches, self.pool.buffers, strict=True):
                rows = buffer[step.first_slot : step.first_slot + step.batch]
                place = ("cpu", 0, np.float32, rows.shape, rows.ctypes.data)
                binding.bind_input(name, *place)
                binding.bind_output(updated, *place)
            if isinstance(step, BidirectionalStep):
                for name, array in self._adapter.items():
                    binding.bind_cpu_input(name, array)
            self._bindings[key] = _Binding(binding)
        return self._bindings[key]


def _values(arrays: _Arrays) -> dict[str, ort.OrtValue]:
    """ONNX Runtime's values of the arrays' own memory."""
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
