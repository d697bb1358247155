"""The ranges of a weight pool for our kernels, from a network's sizes alone.

``write_raw_pool`` writes such a pool from a checkpoint. The check on a GPU fills one with random weights there, since
the weights of an 8B network are too large to copy. A test compares the ranges of both.
"""

from __future__ import annotations

import math
from pathlib import Path

from onnx import TensorProto

from trimode.build.graph.raw_pool import (
    ALIGNMENT,
    KernelConstants,
    PooledLayer,
    PooledLinear,
    PoolRange,
    RawPool,
    merged_matrices,
    merged_name,
)
from trimode.build.graph.results import REAL_TYPES
from trimode.engine.precision import NUMPY_TYPES, Real
from trimode.model.checkpoint import linear_shapes
from trimode.model.config import ModelConfig
from trimode.model.rope import query_scales
from trimode.plugins.operators import Int4Product


class _Layout:
    """Places tensors one after the other, each on a page of its own."""

    def __init__(self, config: ModelConfig, real: Real, group: int) -> None:
        self._shapes = linear_shapes(config)
        self._real = real
        self._group = group
        self._end = 0
        self.stored = 0

    def real(self, name: str, *shape: int) -> PoolRange:
        return self._put(name, REAL_TYPES[self._real], NUMPY_TYPES[self._real].itemsize, shape)

    def fp32(self, name: str, *shape: int) -> PoolRange:
        return self._put(name, TensorProto.FLOAT, 4, shape)

    def int4(self, modules: tuple[str, ...], *, paired: bool = False) -> PooledLinear:
        """Matrices that read the same input, as one int4 matrix with scales and no input scales."""
        name = modules[0] if len(modules) == 1 else merged_name(modules)
        columns, inner = sum(self._shapes[module][0] for module in modules), self._shapes[modules[0]][1]
        node = Int4Product().node(rows=1, inner=inner, columns=columns, group=self._group)
        packed = self._put(name, TensorProto.INT32, 4, tuple(node.shapes["packed"]))
        scale = self.fp32(f"{name}.scale", *node.shapes["scale"])
        return PooledLinear(packed, scale, None, self._group, paired)

    def _put(self, name: str, dtype: int, item: int, shape: tuple[int, ...]) -> PoolRange:
        offset, length = -(-self._end // ALIGNMENT) * ALIGNMENT, math.prod(shape) * item
        self._end = offset + length
        self.stored += length
        return PoolRange(name, dtype, shape, offset, length)


def pool_layout(config: ModelConfig, real: Real, group: int) -> RawPool:
    """Ranges in the order of ``write_raw_pool``. All matrices are int4 in groups of ``group``, the head's too."""
    layout, hidden = _Layout(config, real, group), config.hidden_size
    embedding = layout.real("encoder.embed_tokens", config.vocab_size, hidden)
    *of_layers, head = merged_matrices(config)
    layers = []
    for index in range(config.num_hidden_layers):
        qkv, o, gate_up, down = of_layers[4 * index : 4 * index + 4]
        prefix = f"encoder.layers.{index}"
        layers.append(
            PooledLayer(
                input_layernorm=layout.real(f"{prefix}.input_layernorm", hidden),
                qkv_proj=layout.int4(qkv, paired=True),
                o_proj=layout.int4(o),
                post_attention_layernorm=layout.real(f"{prefix}.post_attention_layernorm", hidden),
                gate_up_proj=layout.int4(gate_up, paired=True),
                down_proj=layout.int4(down),
            )
        )
    norm = layout.real("encoder.norm", hidden)
    pooled_head = layout.int4(head)
    constants = KernelConstants(
        frequencies=layout.fp32("rotary_frequencies", config.head_dim // 2),
        key_scale=layout.fp32("key_scale", 1),
        query_scales=layout.fp32("query_scales", len(query_scales(config))),
        epsilon=layout.fp32("rms_norm_epsilon", 1),
    )
    return RawPool(Path(), layout.stored, embedding, tuple(layers), norm, pooled_head, constants)
