"""The network as ONNX graphs: one builder for both attention patterns.

Modules have the names and the order of :mod:`trimode.model.reference.network`. Attention follows the definition in
:mod:`trimode.model.attention`. Inputs and outputs are those of :mod:`trimode.model.step`. Angles and masks are computed
once per pass and used by all layers. :class:`NetworkOptions` holds what differs between targets. Norms, softmax and
logits are always fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from trimode.build.graph.onnx_builder import ModelBuilder, Shape
from trimode.build.graph.raw_pool import PooledLayer, PooledLinear, PoolRange, RawPool
from trimode.build.graph.results import REAL_TYPES, Masks, declare_results
from trimode.build.graph.step_inputs import declare_adapter, declare_step
from trimode.engine.precision import Real
from trimode.model.config import ModelConfig
from trimode.model.rope import query_scales, yarn_frequencies
from trimode.model.step import (
    AttentionPattern,
    adapter_inputs,
    cache_inputs,
    cache_outputs,
    cache_views,
    partial_sum,
    total_sum,
)

KvRead = Literal["cache", "window", "view"]
FLOAT, INT64, INT32, BOOL, UINT8 = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.BOOL,
    TensorProto.UINT8,
)


class Rotation(NamedTuple):
    """cos and sin of a pass's angles, each [batch, step, head_dim / 2]."""

    cos: str
    sin: str


@dataclass(frozen=True)
class NetworkOptions:
    """Properties of the graphs that depend on the target.

    adapter: whether the diffusion graph has inputs for a draft adapter. top_k: candidates for each row; None makes it
    an input of the graph. activations: type of activations, KV pool, scales and adapter. capacity: KV rows, if they are
    fixed.

    kv_read: what attention reads. ``cache``: the whole KV pool after the write. ``window``: its first rows; the length
    of the input ``window_rows`` is their number. ``view``: the inputs ``k_view.i`` and ``v_view.i``, which are bound to
    the pool's memory; TensorRT would copy a tensor that it writes and then attends to.
    rotate_together: rotate queries and keys in one node and scale the queries after it, so that one kernel can rotate
    both and also write the step's rows. If False, the cos and sin of the queries include the scale.
    select_by_product: gather rows by a one-hot MatMul. Like the adapter's product, it multiplies two activations, so
    both plans contain the constants by which TensorRT scales such products.
    masks: how rows with a token mask are computed. ``branch``: a node chooses between two branches. ``apart``: such
    rows have results of their own, ``masked_*``, which are empty without a mask. A CUDA graph cannot hold a branch.
    ranks: among which the network is divided (:mod:`trimode.model.shards`). If there are several, the products of
    o_proj and down_proj are partial sums.
    sums: how partial sums are added up. ``outside``: the totals are inputs of the graph, ``total.i``, and the products
    are outputs, ``partial.i``, in the order of the network. ``gathered``: a node ``DistCollective``, which TensorRT's
    parser knows, gathers those of all ranks, and the graph adds them in the order of ranks. So their bits do not depend
    on how NCCL would add.
    """

    adapter: bool
    top_k: int | None = None
    activations: Real = "fp32"
    capacity: int | None = None
    kv_read: KvRead = "cache"
    rotate_together: bool = False
    select_by_product: bool = False
    masks: Masks = "branch"
    ranks: int = 1
    sums: Literal["outside", "gathered"] = "outside"


def build_network(
    config: ModelConfig, pool: RawPool, pattern: AttentionPattern, options: NetworkOptions
) -> onnx.ModelProto:
    """The AR graph (``causal``) or the diffusion graph (``bidirectional``) over the weights in ``pool``."""
    return _NetworkGraph(config, pool, pattern, options).build()


class _NetworkGraph:
    def __init__(self, config: ModelConfig, pool: RawPool, pattern: AttentionPattern, options: NetworkOptions) -> None:
        self.config = config
        self.pool = pool
        self.pattern = pattern
        self.options = options
        self.real = REAL_TYPES[options.activations]
        # Query heads that share a KV head become rows of one head. So no executor has to repeat keys and values. On a
        # CPU, it also avoids ONNX Runtime's attention kernel for one row, which rounds differently.
        self.folded = config.num_attention_heads // config.num_key_value_heads
        self.sums = 0
        self.graph = ModelBuilder(pattern, pool.path.name)
        self.op = self.graph.op

    def build(self) -> onnx.ModelProto:
        graph = self.graph
        input_ids, position_ids, self.write_indices, self.visibility, logit_rows = declare_step(graph, self.pattern)
        capacity = self.options.capacity or "capacity"
        cache_shape: Shape = ["batch", self.config.num_key_value_heads, capacity, self.config.head_dim]
        layers = self.config.num_hidden_layers
        for name in cache_inputs(layers) + (cache_views(layers) if self.options.kv_read == "view" else []):
            graph.input(name, self.real, cache_shape)
        self.kv_rows = self._kv_rows()
        self.has_adapter = self.options.adapter and self.pattern == "bidirectional"
        if self.has_adapter:
            scale = declare_adapter(graph, self.config, self.real, "rank")
            self.adapter_scale = self.op("Unsqueeze", scale, [1, 2])

        self.query_scale = self._query_scale(position_ids)
        self.query_rotation, self.key_rotation = self._rotations(position_ids)
        step = self.graph.dims(input_ids, 1, 2)
        self.visible = self._visible(step, self.visibility)
        embedding = self.pool.embed_tokens
        x = self._cast(self.op("Gather", graph.pooled(embedding), input_ids), embedding.dtype)
        for index, layer in enumerate(self.pool.layers):
            graph.scope = f"layers.{index}/"
            attended = self._attend(self._linear(self._rms_norm(x, layer.input_layernorm), layer.qkv_proj), index)
            if layer is self.pool.layers[-1]:
                # From here on, the last layer needs only the rows with logits.
                rows = self.op("Unsqueeze", logit_rows, [2])
                x, attended = (self._rows(value, rows, step) for value in (x, attended))
            x = self._o_proj(attended, x, layer, index)
            x = self._mlp(self._rms_norm(x, layer.post_attention_layernorm), x, layer)
        graph.scope = "head/"
        self._head(x)
        for name in cache_outputs(layers):
            graph.output(name, self.real, cache_shape)
        return graph.model()

    def _rotations(self, position_ids: str) -> tuple[Rotation, Rotation]:
        """YaRN's cos and sin for queries and for keys. Angles are always fp32: bf16 cannot represent every position
        above 256.
        """
        frequencies, attention_factor = yarn_frequencies(self.config)
        positions = self.op("Unsqueeze", self.op("Cast", position_ids, to=FLOAT), [2])
        angles = self.op("Mul", positions, self.graph.constant(frequencies, "rotary_frequencies"))
        cos, sin = self.op("Cos", angles), self.op("Sin", angles)
        if attention_factor != 1:
            factor = float(attention_factor)
            cos, sin = self.op("Mul", cos, factor), self.op("Mul", sin, factor)
        keys = self._rotation(cos, sin)
        if self.options.rotate_together:
            return keys, keys
        scale = self.op("Unsqueeze", self.query_scale, [2])
        return self._rotation(self.op("Mul", cos, scale), self.op("Mul", sin, scale)), keys

    def _query_scale(self, position_ids: str) -> str:
        """The scale of each query, [batch, step]."""
        table = query_scales(self.config).astype(np.float32)
        step = self.op("Div", position_ids, self.config.rope_parameters.original_max_position_embeddings)
        return self.op("Gather", self.graph.constant(table, "query_scale"), step)

    def _rotation(self, cos: str, sin: str) -> Rotation:
        return Rotation(self._cast(cos, FLOAT), self._cast(sin, FLOAT))

    def _kv_rows(self) -> str:
        """Indices of the KV rows that attention reads."""
        if self.options.kv_read == "window":
            rows = self.graph.input("window_rows", INT64, ["window"])
            self.window = self.op("Shape", rows)
            return rows
        capacity = self.op("Squeeze", self.graph.dims("k_cache.0", 2, 3), [0])
        return self.op("Range", 0, capacity, 1)

    def _visible(self, step: str, visibility: str) -> str:
        """Mask of the KV rows that each token attends to: [batch, 1, step, rows] bool, or [batch, 1, group * step,
        rows] for folded queries.
        """
        seen = self._seen(step, visibility)
        if self.folded > 1 and self.pattern == "causal":
            return self.op("Concat", *[seen] * self.folded, axis=2)
        return seen

    def _seen(self, step: str, visibility: str) -> str:
        # The step's first row is 0; committed rows are negative.
        row_in_step = self.op("Sub", self.kv_rows, self.op("Unsqueeze", self.write_indices, [1]))
        row_in_step = self.op("Unsqueeze", row_in_step, [1])
        if self.pattern == "bidirectional":
            seen = self.op("Less", row_in_step, self.op("Unsqueeze", visibility, [1, 2]))
            queries = step if self.folded == 1 else self.op("Mul", step, [self.folded])
            shape = self.op("Concat", [1], queries, [1], axis=0)
            return self.op("Unsqueeze", self.op("Expand", seen, shape), [1])
        committed = self.op("Less", row_in_step, 0)
        inside = self.op("And", self.op("Not", committed), self.op("Less", row_in_step, step))
        last = self.op("Sub", step, [1])
        column = self.op("Min", self.op("Max", row_in_step, [0]), last)
        column = self.op("Expand", column, self.op("Concat", [1], step, [1], axis=0))
        chosen = self.op("GatherElements", visibility, column, axis=2)
        seen = self.op("Or", committed, self.op("And", inside, chosen))
        return self.op("Unsqueeze", seen, [1])

    def _attend(self, qkv: str, index: int) -> str:
        """Write the step's keys and values, and attend: [batch, step, query width]."""
        config = self.config
        layers = config.num_hidden_layers
        q, k, v = self._rotated(qkv, index)
        caches, updated = (names(layers)[2 * index : 2 * index + 2] for names in (cache_inputs, cache_outputs))
        for cache, rows, result in zip(caches, (k, v), updated, strict=True):
            self.graph.node("TensorScatter", [cache, rows, self.write_indices], [result], axis=2, mode="linear")
        if self.folded > 1:
            q = self.op("Reshape", q, [0, config.num_key_value_heads, -1, config.head_dim])
        keys, values = updated
        if self.options.kv_read == "window":
            keys, values = (self.op("Slice", cache, [0], self.window, [2]) for cache in updated)
        elif self.options.kv_read == "view":
            keys, values = cache_views(layers)[2 * index : 2 * index + 2]
            q = self._after(q, updated)
        attended = self.op("Attention", q, keys, values, self.visible, scale=1.0)
        if self.folded > 1:
            attended = self.op("Reshape", attended, [0, config.num_attention_heads, -1, config.head_dim])
        attended = self.op("Transpose", attended, perm=[0, 2, 1, 3])
        return self.op("Reshape", attended, [0, 0, config.query_width])

    def _o_proj(self, attended: str, residual: str, layer: PooledLayer, index: int) -> str:
        if not self.has_adapter:
            return self._linear(attended, layer.o_proj, residual)
        # The adapter reads the attention's output itself; AWQ's input scale applies to the base matrix only.
        down, up = adapter_inputs(index)
        narrow = self.op("Mul", self.op("MatMul", attended, down), self.adapter_scale)
        return self._linear(attended, layer.o_proj, residual, (narrow, up))

    def _rotated(self, qkv: str, index: int) -> tuple[str, str, str]:
        """Rotated queries, rotated keys, and values, each [batch, heads, step, head_dim]."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = f"q.{index}", f"k.{index}", f"v.{index}"
        qkv = self.op("Reshape", qkv, [0, 0, heads + 2 * kv_heads, self.config.head_dim])
        qkv = self.op("Transpose", qkv, perm=[0, 2, 1, 3])
        if self.options.rotate_together:
            both = f"qk.{index}"
            self.graph.node("Split", [qkv, [heads + kv_heads, kv_heads]], [both, v], axis=1)
            both = self.op("RotaryEmbedding", both, *self.key_rotation)
            self.graph.node("Split", [both, [heads, kv_heads]], [q, k], axis=1)
            scale = self.op("Unsqueeze", self.query_scale, [1, 3])
            return self._cast(self.op("Mul", self._as_float(q), scale), FLOAT), k, v
        self.graph.node("Split", [qkv, [heads, kv_heads, kv_heads]], [q, k, v], axis=1)
        q = self.op("RotaryEmbedding", q, *self.query_rotation)
        return q, self.op("RotaryEmbedding", k, *self.key_rotation), v

    def _after(self, q: str, updated: list[str]) -> str:
        """``q``, with a dependency on the written caches: zero of their rows are appended. Without it, no edge orders
        the write before the read of a view. TensorRT removes the concatenation, so the build checks the kernels' order.
        """
        nothing = [self.op("Slice", cache, [0], [0], [2]) for cache in updated]
        return self.op("Concat", q, *nothing, axis=2)

    def _rows(self, x: str, logit_rows: str, step: str) -> str:
        """The rows of ``x`` [batch, step, width] that need logits. logit_rows: [batch, rows, 1]."""
        if not self.options.select_by_product:
            return self.op("GatherND", x, logit_rows, batch_dims=1)
        rows = self.op("Range", 0, self.op("Squeeze", step, [0]), 1)
        return self.op("MatMul", self.op("Cast", self.op("Equal", logit_rows, rows), to=self.real), x)

    def _mlp(self, x: str, residual: str, layer: PooledLayer) -> str:
        return self._linear(self._activated(x, layer.gate_up_proj), layer.down_proj, residual)

    def _activated(self, x: str, linear: PooledLinear) -> str:
        """gate sigmoid(gate) up."""
        gate_up = self._linear(x, linear)
        gate, up = f"{linear.weight.name}.gate", f"{linear.weight.name}.up"
        widths = [self.config.intermediate_size, self.config.intermediate_size]
        self.graph.node("Split", [gate_up, widths], [gate, up], axis=-1)
        return self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)

    def _linear(
        self, x: str, linear: PooledLinear, residual: str | None = None, adapter: tuple[str, str] | None = None
    ) -> str:
        """residual + x W + narrow up. adapter: narrow [batch, step, rank] and up [rank, out]."""
        if linear.input_scale is not None:
            x = self.op("Mul", x, self.graph.pooled(linear.input_scale))
        weight = self.graph.pooled(linear.weight)
        if linear.scale is not None:
            scale = self.graph.pooled(linear.scale)
            weight = self.op("DequantizeLinear", weight, scale, axis=0, block_size=linear.group)
        y = self.op("MatMul", x, weight)
        if adapter is not None:
            y = self.op("Add", y, self.op("MatMul", *adapter))
        if residual is None:
            return y
        if self.options.ranks > 1:
            y = self._total(y) if self.options.sums == "outside" else self._gathered_total(y)
        return self.op("Add", residual, y)

    def _gathered_total(self, y: str) -> str:
        """The sum of this product over all ranks, in fp32."""
        ranks = self.options.ranks
        attributes = {"collective_operation": "all_gather", "reduce_op": "none", "root": -1, "nb_rank": ranks}
        parts = self.op("DistCollective", self.op("Unsqueeze", y, [0]), **attributes)
        total = ""
        for rank in range(ranks):
            part = self._as_float(self.op("Squeeze", self.op("Slice", parts, [rank], [rank + 1], [0]), [0]))
            total = self.op("Add", total, part) if rank else part
        return self._cast(total, FLOAT)

    def _total(self, y: str) -> str:
        """The sum of this product over all ranks, which is added outside of the graph."""
        shape: Shape = ["batch", "rows_of_sum", self.config.hidden_size]
        self.graph.node("Identity", [y], [partial_sum(self.sums)])
        self.graph.output(partial_sum(self.sums), self.real, shape)
        self.sums += 1
        return self.graph.input(total_sum(self.sums - 1), self.real, shape)

    def _cast(self, x: str, dtype: int) -> str:
        """Cast ``x``, whose type is ``dtype``, to the type of the activations."""
        return x if dtype == self.real else self.op("Cast", x, to=self.real)

    def _as_float(self, x: str) -> str:
        return x if self.real == FLOAT else self.op("Cast", x, to=FLOAT)

    def _rms_norm(self, x: str, weight: PoolRange) -> str:
        return self.op("RMSNormalization", x, self.graph.pooled(weight), axis=-1, epsilon=self.config.rms_norm_eps)

    def _head(self, x: str) -> None:
        """Final norm and logits, and the results."""
        logits = self._linear(self._rms_norm(x, self.pool.norm), self.pool.head)
        declare_results(
            self.graph, self.config, logits, self.options.activations, self.options.top_k, self.options.masks
        )
