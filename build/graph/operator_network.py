"""The network as a graph of nodes of the domain ``trimode`` only.

It computes what :mod:`trimode.build.graph.network` computes with standard operators, and has its inputs and outputs.
Every node is one kernel, so the graph is also a list of launches. Its ONNX functions make it runnable by any ONNX
executor. Weights and constants are inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx
from onnx import TensorProto

from trimode.build.graph.onnx_builder import ModelBuilder, Shape
from trimode.build.graph.operator_functions import (
    PARSER_ATTRIBUTES,
    asked_logits_function,
    attend_function,
    dense_product_function,
    embed_function,
    int4_product_function,
    kv_write_function,
    merge_candidates_function,
    merge_function,
    qkv_product_function,
    rms_norm_function,
    rotations_function,
    select_rows_function,
    swiglu_function,
    top_candidates_function,
)
from trimode.build.graph.raw_pool import KernelConstants, PooledLayer, PooledLinear, PoolRange, RawPool
from trimode.build.graph.results import REAL_TYPES, declare_results
from trimode.build.graph.split_products import SplitProducts
from trimode.build.graph.step_inputs import declare_adapter, declare_step
from trimode.engine.precision import Real
from trimode.model.config import ModelConfig
from trimode.model.step import AttentionPattern, adapter_inputs, cache_inputs, cache_outputs, mask_words
from trimode.plugins.operators import (
    AskedLogits,
    Attend,
    DenseProduct,
    Embed,
    Int4Product,
    KvWrite,
    MergeCandidates,
    MergeSplits,
    Operator,
    QkvProduct,
    RmsNorm,
    Rotations,
    SelectRows,
    SwiGlu,
    TopCandidates,
)

FLOAT, INT32, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL


class OperatorNetworkOptions(NamedTuple):
    """activations: type of activations, KV pool and adapter. top_k: candidates of a row. splits: parts of a sequence's
    KV rows that attention computes in parallel. rank: of the draft adapter; 0 without one.

    standard_results: standard operators compute the results from the logits, as :mod:`trimode.build.graph.network` has
    them with masks apart. capacity: KV rows, if they are fixed.
    """

    activations: Real
    top_k: int
    splits: int
    rank: int
    standard_results: bool = False
    capacity: int | None = None


def build_operator_network(
    config: ModelConfig, pool: RawPool, pattern: AttentionPattern, options: OperatorNetworkOptions
) -> onnx.ModelProto:
    """The AR graph (``causal``) or the diffusion graph (``bidirectional``) over the weights in ``pool``."""
    return _OperatorGraph(config, pool, pattern, options).build()


class _OperatorGraph:
    def __init__(
        self, config: ModelConfig, pool: RawPool, pattern: AttentionPattern, options: OperatorNetworkOptions
    ) -> None:
        if pool.constants is None:
            raise ValueError("the pool was not written for kernels")
        self.config = config
        self.pool = pool
        self.constants: KernelConstants = pool.constants
        self.pattern = pattern
        self.options = options
        self.real = REAL_TYPES[options.activations]
        self.graph = ModelBuilder(pattern, None)

    def build(self) -> onnx.ModelProto:
        graph, config = self.graph, self.config
        input_ids, position_ids, self.write_indices, self.visibility, logit_rows = declare_step(graph, self.pattern)
        self.split_products = SplitProducts(graph, self.pool)
        cache_shape: Shape = ["batch", config.num_key_value_heads, self.options.capacity or "capacity", config.head_dim]
        for name in cache_inputs(config.num_hidden_layers):
            graph.input(name, self.real, cache_shape)
        if self.has_adapter:
            self.adapter_scale = declare_adapter(graph, config, self.real, self.options.rank)

        (x,) = self._run(Embed(), [input_ids, graph.pooled(self.pool.embed_tokens)])
        constants = [graph.pooled(entry) for entry in self.constants.rotations]
        length = config.rope_parameters.original_max_position_embeddings
        self.rotations = self._run(Rotations(), [position_ids, *constants], length=length)
        for index, layer in enumerate(self.pool.layers):
            graph.scope = f"layers.{index}/"
            attended = self._attention(self._norm(x, layer.input_layernorm), layer, index)
            if layer is self.pool.layers[-1]:
                # From here on, the last layer needs only the rows with logits.
                x, attended = (
                    self._run(SelectRows(), [value, logit_rows], f"{name}_")[0]
                    for name, value in (("x", x), ("attended", attended))
                )
            x = self._o_proj(attended, x, layer, index)
            normed = self._norm(x, layer.post_attention_layernorm, "mlp_")
            x = self._linear(self._activated(normed, layer.gate_up_proj), layer.down_proj, "x", residual=x)
        graph.scope = "head/"
        self._head(x)
        for name in cache_outputs(config.num_hidden_layers):
            graph.output(name, self.real, cache_shape)
        return graph.model()

    @property
    def has_adapter(self) -> bool:
        return self.options.rank > 0 and self.pattern == "bidirectional"

    def _run(self, operator: Operator, inputs: Sequence[str], prefix: str = "", **attributes: int) -> list[str]:
        """Add a node. Returns its outputs, without those that alias an input."""
        results = [
            f"{self.graph.scope}{prefix}{operand.name}" for operand in operator.outputs if operand.aliases is None
        ]
        return self._run_into(operator, inputs, results, (), **attributes)

    def _run_into(
        self,
        operator: Operator,
        inputs: Sequence[str],
        results: list[str],
        aliases: Sequence[str] = (),
        **attributes: int,
    ) -> list[str]:
        self.graph.call(
            self._function(operator, attributes), inputs, [*results, *aliases], **PARSER_ATTRIBUTES, **attributes
        )
        return results

    def _function(self, operator: Operator, attributes: dict[str, int]) -> onnx.FunctionProto:
        """What the operator computes, in standard operators."""
        match operator:
            case Embed():
                return embed_function()
            case Rotations():
                return rotations_function(attributes["length"], self.real)
            case RmsNorm():
                return rms_norm_function()
            case QkvProduct():
                return qkv_product_function(operator, self.config.head_dim)
            case Int4Product():
                return int4_product_function(operator)
            case DenseProduct():
                return dense_product_function(operator)
            case KvWrite():
                return kv_write_function(self.config.head_dim)
            case Attend():
                return attend_function(operator.pattern)
            case MergeSplits():
                return merge_function()
            case SwiGlu():
                return swiglu_function()
            case SelectRows():
                return select_rows_function()
            case TopCandidates():
                return top_candidates_function(operator, attributes["top_k"], attributes["mask_token"])
            case MergeCandidates():
                return merge_candidates_function(attributes["top_k"])
            case AskedLogits():
                return asked_logits_function()
        raise ValueError(f"operator {operator.name} has no function")

    def _norm(self, x: str, weight: PoolRange, prefix: str = "") -> str:
        inputs = [x, self.graph.pooled(weight), self.graph.pooled(self.constants.epsilon)]
        return self._run(RmsNorm(), inputs, prefix)[0]

    def _attention(self, x: str, layer: PooledLayer, index: int) -> str:
        """Write the step's keys and values, and attend: [batch, step, query width]."""
        config, splits = self.config, self.options.splits
        caches = cache_inputs(config.num_hidden_layers)[2 * index : 2 * index + 2]
        updated = cache_outputs(config.num_hidden_layers)[2 * index : 2 * index + 2]
        q = self._queries(x, layer.qkv_proj, caches, updated)
        attend = Attend("masked" if self.pattern == "causal" else "bidirectional")
        parts = self._run(attend, [q, *updated, self.write_indices, self.visibility], splits=splits)
        group = config.num_attention_heads // config.num_key_value_heads
        return self._run(MergeSplits(), parts, splits=splits, group=group)[0]

    def _queries(self, x: str, linear: PooledLinear, caches: list[str], updated: list[str]) -> str:
        """Rotated queries; keys and values are written. With int4 weights, the product does both."""
        results, written = [f"{self.graph.scope}q"], [*self.rotations, self.write_indices, *caches]
        if not linear.paired:
            qkv = self._linear(x, linear, "qkv")
            return self._run_into(KvWrite(), [qkv, *written], results, updated)[0]
        counters = self.split_products.counters(linear)
        operator = QkvProduct(split=counters is not None, input_scale=linear.input_scale is not None)
        given = [x, *(self.graph.pooled(part) for part in linear.ranges()), *written]
        if counters is None:
            return self._run_into(operator, given, results, updated)[0]
        results.append(f"{self.graph.scope}qkv_partial")
        return self._run_into(operator, [*given, counters[0]], results, [*updated, *counters[1:]])[0]

    def _activated(self, x: str, gate_up: PooledLinear) -> str:
        """The gated activation. With int4 weights, the product computes it."""
        found = self._linear(x, gate_up, "gate_up")
        return found if gate_up.paired else self._run(SwiGlu(), [found])[0]

    def _o_proj(self, attended: str, residual: str, layer: PooledLayer, index: int) -> str:
        if not self.has_adapter:
            return self._linear(attended, layer.o_proj, "attention_x", residual)
        # The adapter reads the attention's output itself; AWQ's input scale applies to the base matrix only.
        down, up = adapter_inputs(index)
        (narrow,) = self._run(DenseProduct(row_scale=True), [attended, down, self.adapter_scale], "narrow_")
        return self._linear(attended, layer.o_proj, "attention_x", residual, (narrow, up))

    def _linear(
        self,
        x: str,
        linear: PooledLinear,
        result: str,
        residual: str | None = None,
        adapter: tuple[str, str] | None = None,
    ) -> str:
        """x W + narrow up + residual. adapter: narrow [batch, step, rank] and up [rank, out]."""
        terms = {"adapter": adapter is not None, "residual": residual is not None}
        given = [x, *(self.graph.pooled(part) for part in linear.ranges()), *(adapter or ())]
        given += [] if residual is None else [residual]
        if linear.scale is None:
            return self._run(DenseProduct(**terms), given, f"{result}_")[0]
        counters = self.split_products.counters(linear)
        terms |= {"split": counters is not None, "input_scale": linear.input_scale is not None, "gated": linear.paired}
        operator = Int4Product(**terms)
        results = [f"{self.graph.scope}{result}_{operand.name}" for operand in operator.outputs if not operand.aliases]
        if counters is None:
            return self._run_into(operator, given, results)[0]
        return self._run_into(operator, [*given, counters[0]], results, counters[1:])[0]

    def _head(self, x: str) -> None:
        """Final norm, logits and candidates."""
        logits = self._linear(self._norm(x, self.pool.norm), self.pool.head, "logits")
        top_k, mask_token = self.options.top_k, self.config.mask_token_id
        if self.options.standard_results:
            declare_results(self.graph, self.config, logits, self.options.activations, top_k, "apart")
            return
        token_mask = self.graph.input("token_mask", INT32, ["batch", "rows", mask_words(self.config.vocab_size)])
        asked_ids = self.graph.input("asked_ids", INT64, ["batch", "rows", "asked"])
        tiles = self._run(TopCandidates(masked=True), [logits, token_mask], top_k=top_k, mask_token=mask_token)
        results = ["top_logits", "top_tokens", "log_sum_exp"]
        self._run_into(MergeCandidates(), tiles, results, top_k=top_k)
        self._run_into(AskedLogits(), [logits, asked_ids], ["asked_logits"])
        self.graph.output("top_logits", FLOAT, ["batch", "rows", top_k])
        self.graph.output("top_tokens", INT64, ["batch", "rows", top_k])
        self.graph.output("log_sum_exp", FLOAT, ["batch", "rows"])
        self.graph.output("asked_logits", FLOAT, ["batch", "rows", "asked"])
