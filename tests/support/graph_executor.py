"""Run the graphs of targets tensorrt and cuda in ONNX Runtime, with our own operators as ONNX functions. Weights, KV
pool and adapter are bound as inputs, as by a runtime of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto
from safetensors.numpy import load_file

from trimode.engine.manifest import PoolEntry
from trimode.engine.targets.tensorrt import GRAPH
from trimode.model.config import ModelConfig
from trimode.model.step import COUNTERS, cache_inputs, cache_outputs, mask_words
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Step

TYPES = {
    "tensor(float)": TensorProto.FLOAT,
    "tensor(float16)": TensorProto.FLOAT16,
    "tensor(bfloat16)": TensorProto.BFLOAT16,
    "tensor(int32)": TensorProto.INT32,
}


def open_session(graph: Path) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    # Products in fp32, not in 8 bits.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    return ort.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])


def bind_pooled(binding: ort.IOBinding, value: ort.NodeArg, data: NDArray[np.uint8]) -> None:
    """Bind bytes without a copy, as numpy may lack their type. ``data`` must outlive the binding."""
    binding.bind_input(value.name, "cpu", 0, TYPES[value.type], value.shape, data.ctypes.data)


class GraphExecutor:
    """Runs ``ar/graph.onnx`` and ``diffusion/graph.onnx`` of ``folder`` over one mapped pool, for one sequence.

    ``seen``: the executed steps.
    """

    def __init__(
        self,
        folder: Path,
        pool: tuple[PoolEntry, ...],
        pool_file: Path,
        adapter: Path,
        config: ModelConfig,
        rows: int,
        real: type[np.floating[Any]],
    ) -> None:
        shape = (1, config.num_key_value_heads, rows, config.head_dim)
        self._caches = [np.zeros(shape, real) for _ in range(2 * config.num_hidden_layers)]
        self._real = real
        self.seen: list[Step] = []
        data = np.memmap(pool_file, np.uint8, mode="r")
        self._weights = {entry.name: data[entry.offset : entry.offset + entry.bytes] for entry in pool}
        self._adapter = {name: array.astype(real) for name, array in load_file(adapter).items()}
        self._layers = config.num_hidden_layers
        self._mask_words = mask_words(config.vocab_size)
        self._sessions = {
            CausalStep: open_session(folder / "ar" / GRAPH),
            BidirectionalStep: open_session(folder / "diffusion" / GRAPH),
        }

    @property
    def _words(self) -> bool:
        """Whether the graphs take a token mask as words."""
        session = self._sessions[CausalStep]
        return next(value.type for value in session.get_inputs() if value.name == "token_mask") == "tensor(int32)"

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        self.seen.append(step)
        session = self._sessions[type(step)]
        binding = session.io_binding()
        caches = zip(cache_inputs(self._layers), cache_outputs(self._layers), self._caches, strict=True)
        for name, updated, buffer in caches:
            place = ("cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(updated, *place)
        feeds = self._feeds(step)
        for value in session.get_inputs():
            if value.name in self._weights:
                bind_pooled(binding, value, self._weights[value.name])
            elif value.name == COUNTERS:
                binding.bind_cpu_input(value.name, np.zeros(value.shape, np.int32))
            elif value.name in feeds:
                binding.bind_cpu_input(value.name, np.ascontiguousarray(feeds[value.name]))
        names = ["top_logits", "top_tokens", "log_sum_exp"]
        if step.token_mask is not None and not self._words:
            names = [f"masked_{name}" for name in names]
        outputs = [value.name for value in session.get_outputs() if not value.name.startswith(("k_", "v_"))]
        for name in outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        found = dict(zip(outputs, binding.copy_outputs_to_cpu()[-len(outputs) :], strict=True))  # in binding order
        return Candidates(*(found[name] for name in names), found["asked_logits"] if step.asked else None)

    def _feeds(self, step: Step) -> Mapping[str, NDArray[np.generic]]:
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": step.input_ids,
            "position_ids": step.position_ids,
            "write_indices": step.write_indices,
            "logit_rows": step.logit_rows,
        } | self._optional_feeds(step)
        if isinstance(step, CausalStep):
            return feeds | {"block_mask": step.block_mask}
        assert isinstance(step, BidirectionalStep)
        scale = step.adapter.astype(self._real)
        return feeds | {"step_lengths": step.step_lengths, "adapter_scale": scale, **self._adapter}

    def _optional_feeds(self, step: Step) -> dict[str, NDArray[np.generic]]:
        """Graphs of target cuda take a mask of words for all rows, those of target tensorrt one of bytes for 0 rows."""
        rows = step.logit_rows.shape
        if self._words:
            mask = (
                np.full((*rows, self._mask_words), 2**32 - 1, np.uint32) if step.token_mask is None else step.token_mask
            )
            asked = np.zeros((*rows, 1), np.int64) if step.asked_ids is None else step.asked_ids
            return {"token_mask": mask.view(np.int32), "asked_ids": asked}
        no_mask = np.empty((step.batch, 0, self._mask_words), np.uint32)
        mask = no_mask if step.token_mask is None else step.token_mask
        asked = np.empty((*rows, 0), np.int64) if step.asked_ids is None else step.asked_ids
        return {"token_mask": mask.view(np.uint8), "asked_ids": asked}
