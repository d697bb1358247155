"""Target ``cpu``: two ONNX Runtime sessions over one mapped weight pool, bound to the KV pool's own memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from safetensors.numpy import load_file

from trimode.model.errors import TriModeError
from trimode.model.machine import instruction_set
from trimode.model.manifest import ADAPTER, POOL, Manifest
from trimode.model.step import cache_inputs, cache_outputs
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Step
from trimode.runtime.kv_pool import KvPool

_FOLDERS: dict[type[Step], str] = {CausalStep: "ar", BidirectionalStep: "diffusion"}


class CpuExecutor:
    """Loads ``ar/`` and ``diffusion/`` of an engine directory; raises TriModeError if they are not for this machine."""

    def __init__(
        self, engine: Path, manifest: Manifest, threads: int | None = None, kv_cache_bytes: int | None = None
    ) -> None:
        _refuse_foreign_layout(engine, manifest)
        model, capacity = manifest.model, manifest.limits.capacity
        self.pool = KvPool(model.num_hidden_layers, model.num_key_value_heads, model.head_dim, capacity, kv_cache_bytes)
        self._top_k = manifest.limits.top_k
        self._caches = list(
            zip(cache_inputs(model.num_hidden_layers), cache_outputs(model.num_hidden_layers), strict=True)
        )
        self._adapter = load_file(engine / ADAPTER) if manifest.adapter else {}
        self._sessions = {
            kind: _load(engine, folder, threads or len(os.sched_getaffinity(0))) for kind, folder in _FOLDERS.items()
        }
        # A binding of the caches is good until the pool moves.
        self._bindings: dict[tuple[type[Step], int, int], ort.IOBinding] = {}
        self._bound_generation = self.pool.generation

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        self.pool.reserve(step.rows_written)
        binding = self._binding(step)
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
            if self._adapter:
                inputs["adapter_scale"] = step.adapter.astype(np.float32)
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        rows = step.logit_rows.shape
        candidates = Candidates(
            logits=np.empty((*rows, self._top_k), np.float32),
            tokens=np.empty((*rows, self._top_k), np.int64),
            log_sum_exp=np.empty(rows, np.float32),
        )
        results: dict[str, NDArray[Any]] = {
            "top_logits": candidates.logits,
            "top_tokens": candidates.tokens,
            "log_sum_exp": candidates.log_sum_exp,
        }
        for name, result in results.items():
            binding.bind_output(name, "cpu", 0, result.dtype, result.shape, result.ctypes.data)
        self._sessions[type(step)].run_with_iobinding(binding)
        return candidates

    def _binding(self, step: Step) -> ort.IOBinding:
        """A binding whose caches are the step's slots of the pool, inputs and outputs at the same addresses."""
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
            self._bindings[key] = binding
        return self._bindings[key]


def _refuse_foreign_layout(engine: Path, manifest: Manifest) -> None:
    """The pool's packed copies fit one kernel library and instruction set; others would make nonsense of them."""
    remedy = f"build it again here: trimode build CHECKPOINT {engine}"
    if manifest.onnxruntime != ort.__version__:
        raise TriModeError(
            f"{engine} was built with onnxruntime {manifest.onnxruntime}, this is {ort.__version__}; {remedy}"
        )
    if manifest.instruction_set != instruction_set():
        raise TriModeError(
            f"{engine} was built for another processor ({manifest.instruction_set}; this is {instruction_set()}); "
            f"{remedy}"
        )


def _load(engine: Path, folder: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # done by the build
    options.intra_op_num_threads = threads
    # The engines take turns: threads spin within a pass, which is faster, and not into the other engine's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str((engine / POOL).parent)
    )
    path = engine / folder / "model.onnx"
    try:
        return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own unrelated exception types
        raise TriModeError(f"{path} cannot be loaded by onnxruntime: {str(error).splitlines()[0]}") from None
