"""Target ``cpu``: two ONNX Runtime sessions over one mapped weight pool, bound to the KV pool's own memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from safetensors.numpy import load_file

from trimode.common.machine import usable_cpus
from trimode.engine.files import ADAPTER
from trimode.engine.manifest import Manifest
from trimode.model.step import cache_inputs, cache_outputs
from trimode.runtime.cpu.graph_passes import FOLDERS, Arrays, GraphPasses
from trimode.runtime.cpu.sessions import folder_of_pool, load_session, refuse_foreign_layout
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Step

log = logging.getLogger(__name__)

# Shapes of passes whose memory is kept, and bindings of this memory and some slots' caches.
_MOST_SHAPES = 256
_MOST_BINDINGS = 1024

# Of a pass: its kind, its sizes, and whether it has a token mask.
_Shape = tuple[type[Step], tuple[int, ...], bool]


class _Results(NamedTuple):
    top_logits: NDArray[np.float32]
    top_tokens: NDArray[np.int64]
    log_sum_exp: NDArray[np.float32]
    asked_logits: NDArray[np.float32]


class _ShapeMemory(NamedTuple):
    """Inputs and results of passes of one shape, as arrays and as ONNX Runtime's values of the same memory."""

    inputs: Arrays
    results: _Results
    input_values: dict[str, ort.OrtValue]
    result_values: dict[str, ort.OrtValue]


class CpuExecutor(GraphPasses):
    """Loads ``ar/`` and ``diffusion/`` of an engine directory; raises TriModeError if they are not for this machine."""

    def __init__(
        self, engine: Path, manifest: Manifest, threads: int | None = None, kv_cache_bytes: int | None = None
    ) -> None:
        refuse_foreign_layout(engine, manifest)
        super().__init__(manifest, manifest.model, kv_cache_bytes)
        layers = manifest.model.num_hidden_layers
        self._caches = list(zip(cache_inputs(layers), cache_outputs(layers), strict=True))
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
        self._memories: dict[_Shape, _ShapeMemory] = {}
        # Binding takes longer than the rest of the call. A binding is valid until the pool is reallocated.
        self._bindings: dict[tuple[_Shape, int], ort.IOBinding] = {}
        self._bound_generation = self.pool.generation

    def _run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        shape = self._shape(step)
        memory = self._memory(step, shape)
        for name, array in self._inputs(step).items():
            memory.inputs[name][...] = array
        self._sessions[type(step)].run_with_iobinding(self._binding(step, shape, memory))
        logits, tokens, log_sum_exp, asked = memory.results
        return Candidates(
            logits.copy(), tokens.copy(), log_sum_exp.copy(), None if step.asked_ids is None else asked.copy()
        )

    def _shape(self, step: CausalStep | BidirectionalStep) -> _Shape:
        sizes = (*step.input_ids.shape, step.logit_rows.shape[1], self._candidates(step), step.asked)
        return type(step), sizes, step.token_mask is not None

    def _memory(self, step: CausalStep | BidirectionalStep, shape: _Shape) -> _ShapeMemory:
        if shape not in self._memories:
            if len(self._memories) == _MOST_SHAPES:
                self._memories.clear()
                self._bindings.clear()
            top_k, batch_and_rows = self._candidates(step), step.logit_rows.shape
            inputs = {name: np.empty(array.shape, array.dtype) for name, array in self._inputs(step).items()}
            results = _Results(
                np.empty((*batch_and_rows, top_k), np.float32),
                np.empty((*batch_and_rows, top_k), np.int64),
                np.empty(batch_and_rows, np.float32),
                np.empty((*batch_and_rows, step.asked), np.float32),
            )
            self._memories[shape] = _ShapeMemory(inputs, results, _values(inputs), _values(results._asdict()))
        return self._memories[shape]

    def _binding(self, step: Step, shape: _Shape, memory: _ShapeMemory) -> ort.IOBinding:
        """The binding of the memory and of the step's slots."""
        if self._bound_generation != self.pool.generation:
            self._bindings.clear()
            self._bound_generation = self.pool.generation
        key = (shape, step.first_slot)
        if key not in self._bindings:
            if len(self._bindings) == _MOST_BINDINGS:
                self._bindings.clear()
            self._bindings[key] = self._bound(step, memory)
        return self._bindings[key]

    def _bound(self, step: Step, memory: _ShapeMemory) -> ort.IOBinding:
        """A new binding, with the same addresses for the caches as inputs and as outputs."""
        binding = self._sessions[type(step)].io_binding()
        for (name, updated), buffer in zip(self._caches, self.pool.buffers, strict=True):
            rows = buffer[step.first_slot : step.first_slot + step.batch]
            place = ("cpu", 0, np.float32, rows.shape, rows.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(updated, *place)
        if isinstance(step, BidirectionalStep):
            for name, array in self._adapter.items():
                binding.bind_cpu_input(name, array)
        for name, value in memory.input_values.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in memory.result_values.items():
            binding.bind_ortvalue_output(name, value)
        return binding


def _values(arrays: Arrays) -> dict[str, ort.OrtValue]:
    """ONNX Runtime's values of the arrays' own memory."""
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
