"""The part of a checkpoint that one rank holds, as :mod:`trimode.model.shards` divides it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trimode.common.errors import TriModeError
from trimode.model.checkpoint import HEAD, Checkpoint, DenseWeight, Int4Weight
from trimode.model.shards import Shard

# Matrices [out, in] of which a rank holds columns, so that their products are partial sums. Of the others it has rows.
_BY_COLUMNS = ("o_proj", "down_proj")


def _by_columns(module: str) -> bool:
    return module.rpartition(".")[2] in _BY_COLUMNS


class ShardedCheckpoint:
    """What the weight pool is written from, of one rank. ``config`` has the sizes of the rank's part."""

    def __init__(self, checkpoint: Checkpoint, shard: Shard) -> None:
        self.folder = checkpoint.folder
        self.config = shard.config(checkpoint.config)
        self._checkpoint = checkpoint
        self._shard = shard

    def vector(self, name: str) -> NDArray[np.generic]:
        """An embedding or norm tensor; every rank has all of it."""
        return self._checkpoint.vector(name)

    def linear(self, module: str) -> DenseWeight | Int4Weight:
        """The rank's rows or columns of a matrix. int4 columns are whole groups; int4 rows are whole bytes."""
        weight = self._checkpoint.linear(module)
        by_columns = _by_columns(module)
        if isinstance(weight, DenseWeight):
            if by_columns:
                return DenseWeight(weight.array[:, self._shard.part(weight.array.shape[1])])
            return DenseWeight(weight.array[self._shard.part(weight.array.shape[0])])
        if not by_columns:
            packed = weight.packed[self._shard.part(len(weight.packed))]
            return Int4Weight(packed, weight.scale[self._shard.part(len(weight.scale))], self.input_scale(module))
        columns = self._shard.part(weight.packed.shape[1])
        return Int4Weight(
            weight.packed[:, columns],
            weight.scale[:, self._shard.part(weight.scale.shape[1])],
            self.input_scale(module),
        )

    def input_scale(self, module: str) -> NDArray[np.float32] | None:
        """Of a matrix by columns, the rank's part. The others read a norm, of which every rank has all."""
        scale = self._checkpoint.input_scale(module)
        return scale if scale is None or not _by_columns(module) else scale[self._shard.part(len(scale))]

    def adapter_matrices(
        self, layer: int, *, scaled_input: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The draft adapter as inputs of the diffusion engine, for ``x @ down @ up``: down [rank's query width, r],
        and up [r, hidden], with the adapter's scale.

        scaled_input: x is the attention's output times the input scale of o_proj, so down is divided by it. Raises
        TriModeError if a value of that scale is 0.
        """
        adapter = self._checkpoint.adapter
        if adapter is None:
            raise ValueError(f"{self.folder} has no adapter")
        a, b = adapter.matrices(layer)
        down = a.astype(np.float32).T[self._shard.part(a.shape[1])]
        module = f"encoder.layers.{layer}.self_attn.o_proj"
        if scaled_input and (scale := self.input_scale(module)) is not None:
            if not scale.all():
                raise TriModeError(
                    f"{self.folder}: {module}.pre_quant_scale has zeros, so the draft adapter cannot read its input; "
                    "quantise the checkpoint with `trimode quantize`"
                )
            down = down / scale[:, None]
        return np.ascontiguousarray(down), np.ascontiguousarray(
            b.astype(np.float32).T * np.float32(adapter.config.scale)
        )


def sharded(checkpoint: Checkpoint, ranks: int) -> tuple[ShardedCheckpoint, ...]:
    """The parts of all ranks. Raises TriModeError if the checkpoint cannot be divided among so many."""
    config, quantization = checkpoint.config, checkpoint.quantization
    group = 1 if quantization is None else quantization.group_size

    def unit(int4: int, *modules: str) -> int:
        """What a rank's share must be a multiple of: ``int4`` if one of these matrices (or the head) is int4."""
        layers = range(config.num_hidden_layers)
        names = [f"encoder.layers.{index}.{module}" for index in layers for module in modules] or [HEAD]
        return int4 if any(checkpoint.is_int4(name) for name in names) else 1

    for what, size, multiple in (
        ("KV heads", config.num_key_value_heads, 1),
        ("columns of o_proj", config.query_width, unit(group, "self_attn.o_proj")),
        ("columns of down_proj", config.intermediate_size, unit(group, "mlp.down_proj")),
        ("rows of gate_proj and up_proj", config.intermediate_size, unit(2, "mlp.gate_proj", "mlp.up_proj")),
        ("tokens in its vocabulary", config.vocab_size, unit(2)),
    ):
        if size % (ranks * multiple):
            of = "" if multiple == 1 else f" times {multiple}, as its int4 matrices are stored"
            remedy = f"; quantise with a smaller --group than {group}" if multiple == group > 2 else ""
            raise TriModeError(
                f"{checkpoint.folder} cannot be divided among --tp {ranks} ranks: it has {size} {what}, which is not "
                f"a multiple of {ranks}{of}{remedy}"
            )
    return tuple(ShardedCheckpoint(checkpoint, Shard(rank, ranks)) for rank in range(ranks))
