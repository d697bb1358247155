"""The network as ONNX graphs of standard operators: one function, two attention patterns.

It reads like :mod:`trimode.model.reference`, module by module; the step contract is :mod:`trimode.model.step`. Angles
and masks are made once a pass and shared by all layers. What may differ by target is in :class:`NetworkOptions`; norms,
softmax and logits are fp32 in every one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from trimode.build.onnx_graph import OnnxGraph, Shape
from trimode.build.raw_pool import PooledLayer, PooledLinear, PoolRange, RawPool
from trimode.model.config import ModelConfig
from trimode.model.manifest import Real
from trimode.model.rope import yarn_frequencies
from trimode.model.step import AttentionPattern, adapter_inputs, cache_inputs, cache_outputs

REAL_TYPES: dict[Real, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
# Far below any logit, yet finite: its exponential is 0, and no NaN can come of it.
NEVER = np.float32(-1e30)


class Rotation(NamedTuple):
    """cos and sin of a pass's angles, each [batch, step, head_dim / 2]."""

    cos: str
    sin: str


@dataclass(frozen=True)
class NetworkOptions:
    """What a target chooses.

    adapter: whether the diffusion graph takes a draft adapter. top_k: candidates a row; None has the pass say how many.
    activations: type of activations, KV pool, scales and adapter. capacity: KV rows if the target needs them fixed.
    window: attend to the first rows of the KV pool only, as many as the input ``window_rows`` is long. fold_queries:
    give the queries that share a KV head to the attention as further rows of one head, so that no executor need repeat
    keys and values.
    """

    adapter: bool
    top_k: int | None = None
    activations: Real = "fp32"
    capacity: int | None = None
    window: bool = False
    fold_queries: bool = False


def build_network(
    config: ModelConfig, pool: RawPool, pattern: AttentionPattern, options: NetworkOptions
) -> onnx.ModelProto:
    """The AR graph (``causal``) or the diffusion graph (``bidirectional``) over the weights in ``pool``."""
    return _Network(config, pool, pattern, options).build()


class _Network:
    def __init__(self, config: ModelConfig, pool: RawPool, pattern: AttentionPattern, options: NetworkOptions) -> None:
        self.config = config
        self.pool = pool
        self.pattern = pattern
        self.options = options
        self.real = REAL_TYPES[options.activations]
        self.graph = OnnxGraph(pattern, pool.path.name)
        self.op = self.graph.op
        self.ints = self.graph.ints

    def build(self) -> onnx.ModelProto:
        graph = self.graph
        input_ids = graph.input("input_ids", INT64, ["batch", "step"])
        position_ids = graph.input("position_ids", INT64, ["batch", "step"])
        self.write_indices = graph.input("write_indices", INT64, ["batch"])
        visibility = (
            graph.input("block_mask", BOOL, ["batch", "step", "step"])
            if self.pattern == "causal"
            else graph.input("step_lengths", INT64, ["batch"])
        )
        logit_rows = graph.input("logit_rows", INT64, ["batch", "rows"])
        capacity = self.options.capacity or "capacity"
        cache_shape: Shape = ["batch", self.config.num_key_value_heads, capacity, self.config.head_dim]
        for name in cache_inputs(self.config.num_hidden_layers):
            graph.input(name, self.real, cache_shape)
        self.kv_rows = self._kv_rows()
        self.has_adapter = self.options.adapter and self.pattern == "bidirectional"
        if self.has_adapter:
            self._declare_adapter()

        self.query_rotation, self.key_rotation = self._rotations(position_ids)
        self.visible = self._visible(input_ids, visibility)
        embedding = self.pool.embed_tokens
        x = self._cast(self.op("Gather", graph.pooled(embedding), input_ids), embedding.dtype)
        for index, layer in enumerate(self.pool.layers):
            graph.scope = f"layers.{index}/"
            attended = self._attention(self._rms_norm(x, layer.input_layernorm), layer, index)
            if layer is self.pool.layers[-1]:
                # Past its keys and values the last layer serves the logits alone.
                rows = self.op("Unsqueeze", logit_rows, self.ints(2))
                x, attended = (self.op("GatherND", value, rows, batch_dims=1) for value in (x, attended))
            x = self.op("Add", x, self._o_proj(attended, layer, index))
            x = self.op("Add", x, self._mlp(self._rms_norm(x, layer.post_attention_layernorm), layer))
        graph.scope = "head/"
        self._head(x)
        for name in cache_outputs(self.config.num_hidden_layers):
            graph.output(name, self.real, cache_shape)
        return graph.model()

    def _declare_adapter(self) -> None:
        scale = self.graph.input("adapter_scale", self.real, ["batch"])
        self.adapter_scale = self.op("Unsqueeze", scale, self.ints(1, 2))
        for index in range(self.config.num_hidden_layers):
            down, up = adapter_inputs(index)
            self.graph.input(down, self.real, [self.config.query_width, "rank"])
            self.graph.input(up, self.real, ["rank", self.config.hidden_size])

    def _rotations(self, position_ids: str) -> tuple[Rotation, Rotation]:
        """YaRN's cos and sin for queries and for keys; the queries' carry the scales of their position and of the
        attention as well. Angles are
        fp32 whatever the activations: a position past 256 has no exact 16-bit value.
        """
        frequencies, attention_factor = yarn_frequencies(self.config)
        positions = self.op("Unsqueeze", self.op("Cast", position_ids, to=FLOAT), self.ints(2))
        angles = self.op("Mul", positions, self.graph.constant("rotary_frequencies", frequencies))
        cos, sin = self.op("Cos", angles), self.op("Sin", angles)
        if attention_factor != 1:
            factor = self._float("attention_factor", attention_factor)
            cos, sin = self.op("Mul", cos, factor), self.op("Mul", sin, factor)
        scale = self.op("Unsqueeze", self._query_scale(position_ids), self.ints(2))
        queries = self._rotation(self.op("Mul", cos, scale), self.op("Mul", sin, scale))
        return queries, self._rotation(cos, sin)

    def _query_scale(self, position_ids: str) -> str:
        """1 + beta * log(1 + floor(position / original length)), [batch, step], from a table of its few values.

        The attention's own scale rides along: compilers would apply its root to every key of the pool as well.
        """
        rope = self.config.rope_parameters
        length = rope.original_max_position_embeddings
        steps = np.arange(-(-self.config.max_position_embeddings // length))
        table = (1 + rope.llama_4_scaling_beta * np.log1p(steps)) * self.config.head_dim**-0.5
        step = self.op("Div", position_ids, self._int("original_max_position_embeddings", length))
        return self.op("Gather", self.graph.constant("query_scale", table.astype(np.float32)), step)

    def _rotation(self, cos: str, sin: str) -> Rotation:
        return Rotation(self._cast(cos, FLOAT), self._cast(sin, FLOAT))

    def _kv_rows(self) -> str:
        """The numbers of the KV rows that this pass attends to."""
        if self.options.window:
            return self.graph.input("window_rows", INT64, ["window"])
        capacity = self.op("Shape", "k_cache.0", start=2, end=3)
        return self.op("Range", self._int("zero", 0), self.op("Squeeze", capacity, self.ints(0)), self._int("unit", 1))

    def _visible(self, input_ids: str, visibility: str) -> str:
        """Which KV rows each token sees, [batch, 1, step, rows] bool, [batch, 1, group * step, rows] for folded
        queries: the committed ones, and its step's by pattern.
        """
        seen = self._seen(input_ids, visibility)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        if self.options.fold_queries and group > 1:
            return self.op("Concat", *[seen] * group, axis=2)
        return seen

    def _seen(self, input_ids: str, visibility: str) -> str:
        step = self.op("Shape", input_ids, start=1, end=2)
        # 0 is the step's first row; committed rows are negative.
        row_in_step = self.op("Sub", self.kv_rows, self.op("Unsqueeze", self.write_indices, self.ints(1)))
        row_in_step = self.op("Unsqueeze", row_in_step, self.ints(1))
        if self.pattern == "bidirectional":
            seen = self.op("Less", row_in_step, self.op("Unsqueeze", visibility, self.ints(1, 2)))
            shape = self.op("Concat", self.ints(1), step, self.ints(1), axis=0)
            return self.op("Unsqueeze", self.op("Expand", seen, shape), self.ints(1))
        committed = self.op("Less", row_in_step, self._int("zero", 0))
        inside = self.op("And", self.op("Not", committed), self.op("Less", row_in_step, step))
        last = self.op("Sub", step, self.ints(1))
        column = self.op("Min", self.op("Max", row_in_step, self.ints(0)), last)
        column = self.op("Expand", column, self.op("Concat", self.ints(1), step, self.ints(1), axis=0))
        chosen = self.op("GatherElements", visibility, column, axis=2)
        seen = self.op("Or", committed, self.op("And", inside, chosen))
        return self.op("Unsqueeze", seen, self.ints(1))

    def _attention(self, x: str, layer: PooledLayer, index: int) -> str:
        """Write the step's keys and values, attend to what is visible; [batch, step, query width]."""
        config = self.config
        q, k, v = f"q.{index}", f"k.{index}", f"v.{index}"
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        qkv = self.op("Reshape", self._linear(x, layer.qkv_proj), self.ints(0, 0, sum(heads), config.head_dim))
        qkv = self.op("Transpose", qkv, perm=[0, 2, 1, 3])
        self.graph.node("Split", [qkv, self.ints(*heads)], [q, k, v], axis=1)
        q = self.op("RotaryEmbedding", q, *self.query_rotation)
        k = self.op("RotaryEmbedding", k, *self.key_rotation)
        caches, updated = cache_inputs(config.num_hidden_layers), cache_outputs(config.num_hidden_layers)
        for offset, rows in enumerate((k, v)):
            where = 2 * index + offset
            self.graph.node(
                "TensorScatter", [caches[where], rows, self.write_indices], [updated[where]], axis=2, mode="linear"
            )
        keys, values = (self._window(name) for name in updated[2 * index : 2 * index + 2])
        if self.options.fold_queries:
            q = self.op("Reshape", q, self.ints(0, config.num_key_value_heads, -1, config.head_dim))
        attended = self.op("Attention", q, keys, values, self.visible, scale=1.0)
        if self.options.fold_queries:
            attended = self.op("Reshape", attended, self.ints(0, config.num_attention_heads, -1, config.head_dim))
        attended = self.op("Transpose", attended, perm=[0, 2, 1, 3])
        return self.op("Reshape", attended, self.ints(0, 0, config.query_width))

    def _o_proj(self, attended: str, layer: PooledLayer, index: int) -> str:
        projected = self._linear(attended, layer.o_proj)
        if not self.has_adapter:
            return projected
        # The adapter reads the attention's own output, not the one AWQ rescales for the base matrix.
        down, up = adapter_inputs(index)
        narrow = self.op("Mul", self.op("MatMul", attended, down), self.adapter_scale)
        return self.op("Add", projected, self.op("MatMul", narrow, up))

    def _window(self, cache: str) -> str:
        if not self.options.window:
            return cache
        rows = self.op("Shape", self.kv_rows)
        return self.op("Slice", cache, self.ints(0), rows, self.ints(2))

    def _mlp(self, x: str, layer: PooledLayer) -> str:
        gate, up = f"{layer.gate_up_proj.weight.name}.gate", f"{layer.gate_up_proj.weight.name}.up"
        widths = self.ints(self.config.intermediate_size, self.config.intermediate_size)
        self.graph.node("Split", [self._linear(x, layer.gate_up_proj), widths], [gate, up], axis=-1)
        activated = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self._linear(self.op("Mul", activated, up), layer.down_proj)

    def _linear(self, x: str, linear: PooledLinear) -> str:
        if linear.input_scale is not None:
            x = self.op("Mul", x, self.graph.pooled(linear.input_scale))
        weight = self.graph.pooled(linear.weight)
        if linear.scale is not None:
            scale = self.graph.pooled(linear.scale)
            weight = self.op("DequantizeLinear", weight, scale, axis=0, block_size=linear.group)
        return self.op("MatMul", x, weight)

    def _cast(self, x: str, dtype: int) -> str:
        """``x`` of type ``dtype`` as an activation."""
        return x if dtype == self.real else self.op("Cast", x, to=self.real)

    def _rms_norm(self, x: str, weight: PoolRange) -> str:
        return self.op("RMSNormalization", x, self.graph.pooled(weight), axis=-1, epsilon=self.config.rms_norm_eps)

    def _head(self, x: str) -> None:
        """Final norm, logits, and what of them goes to the host: the best ``top_k`` of each row and its log-sum-exp."""
        logits = self._linear(self._rms_norm(x, self.pool.norm), self.pool.head)
        if self.real != FLOAT:
            logits = self.op("Cast", logits, to=FLOAT)
        # The mask token is an input only.
        bias = np.zeros(self.config.vocab_size, np.float32)
        bias[self.config.mask_token_id] = NEVER
        logits = self.op("Add", logits, self.graph.constant("mask_token_bias", bias))
        top_k = self.options.top_k
        wanted = self.graph.input("top_k", INT64, [1]) if top_k is None else self.ints(top_k)
        self.graph.node("TopK", [logits, wanted], ["top_logits", "top_tokens"], axis=-1)
        # The best logit is at hand: ReduceLogSumExp would read the row once more to find it.
        best = self.op("Slice", "top_logits", self.ints(0), self.ints(1), self.ints(2))
        total = self.op("ReduceSum", self.op("Exp", self.op("Sub", logits, best)), self.ints(-1), keepdims=0)
        self.graph.node("Add", [self.op("Log", total), self.op("Squeeze", best, self.ints(2))], ["log_sum_exp"])
        self.graph.output("top_logits", FLOAT, ["batch", "rows", top_k or "top_k"])
        self.graph.output("top_tokens", INT64, ["batch", "rows", top_k or "top_k"])
        self.graph.output("log_sum_exp", FLOAT, ["batch", "rows"])

    def _float(self, name: str, value: float) -> str:
        return self.graph.constant(f"float_{name}", np.array(value, np.float32))

    def _int(self, name: str, value: int) -> str:
        return self.graph.constant(f"int_{name}", np.array(value, np.int64))
