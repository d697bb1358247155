"""One rank of an engine for target ``cpu``: ONNX Runtime sessions between the sums of ranks.

It is for correctness on CPUs, and for developing on them. One process with all the threads is faster, since the ranks
share the memory bandwidth of one machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load_file

from trimode.engine.files import ADAPTER, rank_folder
from trimode.engine.manifest import Manifest
from trimode.model.shards import Shard
from trimode.model.step import cache_inputs, cache_outputs, partial_sum, total_sum
from trimode.runtime.cpu.graph_passes import FOLDERS, GraphPasses
from trimode.runtime.cpu.sessions import folder_of_pool, load_session
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep
from trimode.runtime.ranks.group import Group
from trimode.runtime.ranks.merging import local_step


class _Piece(NamedTuple):
    """The graph between two sums, and the names of its inputs and outputs."""

    session: ort.InferenceSession
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class CpuRankExecutor(GraphPasses):
    """Runs the rank's part of each pass. Its candidates are those of its part of the vocabulary, counted from its first
    token. An exception other than TriModeError may leave the other ranks waiting in a sum.

    engine: the engine directory, which holds the parts of all ranks.
    """

    def __init__(
        self, engine: Path, manifest: Manifest, group: Group, threads: int, kv_cache_bytes: int | None
    ) -> None:
        shard = Shard(group.rank, manifest.ranks)
        folder, model = engine / rank_folder(*shard), shard.config(manifest.model)
        super().__init__(manifest, model, kv_cache_bytes)
        self._tokens = shard.part(manifest.model.vocab_size)
        self.threads = threads
        self._group = group
        layers = model.num_hidden_layers
        self._caches = {
            name: index for names in (cache_inputs(layers), cache_outputs(layers)) for index, name in enumerate(names)
        }
        self._adapter = {
            name: ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in (load_file(folder / ADAPTER) if manifest.adapter else {}).items()
        }
        with folder_of_pool(folder) as weights:
            self._passes = {
                kind: [
                    _piece(load_session(folder / engine_folder / name, weights, threads))
                    for name in manifest.target.engine_files
                ]
                for kind, engine_folder in FOLDERS.items()
            }

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        """Raises TriModeError before the first sum if the KV pool has no room, on every rank alike."""
        return super().run(local_step(step, self._tokens, self._top_k))

    def _run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in self._inputs(step).items()
        }
        if isinstance(step, BidirectionalStep):
            values |= self._adapter
        pieces = self._passes[type(step)]
        for index, piece in enumerate(pieces):
            self._run_piece(piece, step, values)
            if piece is not pieces[-1]:
                total = self._group.total(values[partial_sum(index)].numpy())
                values[total_sum(index)] = ort.OrtValue.ortvalue_from_numpy(total)
        logits, tokens, log_sum_exp, asked = (
            values[name].numpy() for name in ("top_logits", "top_tokens", "log_sum_exp", "asked_logits")
        )
        return Candidates(logits, tokens, log_sum_exp, None if step.asked_ids is None else asked)

    def _run_piece(self, piece: _Piece, step: CausalStep | BidirectionalStep, values: dict[str, ort.OrtValue]) -> None:
        """Add the outputs of the piece to ``values``. KV rows are written in place."""
        binding = piece.session.io_binding()
        for name in piece.inputs:
            if name in self._caches:
                binding.bind_input(name, *self._rows(name, step))
            else:
                binding.bind_ortvalue_input(name, values[name])
        for name in piece.outputs:
            if name in self._caches:
                binding.bind_output(name, *self._rows(name, step))
            else:
                binding.bind_output(name, "cpu")
        piece.session.run_with_iobinding(binding)
        values |= zip(piece.outputs, binding.get_outputs(), strict=True)

    def _rows(self, name: str, step: CausalStep | BidirectionalStep) -> tuple[str, int, type, tuple[int, ...], int]:
        """The memory of the step's slots of a cache."""
        rows = self.pool.buffers[self._caches[name]][step.first_slot : step.first_slot + step.batch]
        return "cpu", 0, np.float32, rows.shape, rows.ctypes.data


def _piece(session: ort.InferenceSession) -> _Piece:
    names = [tuple(value.name for value in values) for values in (session.get_inputs(), session.get_outputs())]
    return _Piece(session, *names)
