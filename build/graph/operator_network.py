"""The network as a graph of nodes of the domain ``trimode``.

It computes what :mod:`trimode.build.graph.network` computes with standard operators, and has its inputs and outputs.
Every node is one kernel, so the graph is also a list of launches. Its ONNX functions make it runnable by any ONNX
executor. Weights and constants are inputs of the graph. For target ``tensorrt``, standard operators compute the
results from the logits and, as an option, products with weights that are not int4.

The graph of a rank (:mod:`trimode.model.shards`) has two nodes ``AllReduce`` in each layer. They have no function: they
read the memory of other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx
from onnx import TensorProto

from trimode.build.graph.onnx_builder import ModelBuilder, Shape
from trimode.build.graph.operator_functions import (
    PARSER_ATTRIBUTES,
    attend_function,
    dense_head_function,
    dense_product_function,
    embed_function,
    int4_head_function,
    int4_product_function,
    kv_write_function,
    merge_candidates_function,
    merge_function,
    qkv_product_function,
    rms_norm_function,
    rotations_function,
    select_rows_function,
    swiglu_function,
)
from trimode.build.graph.raw_pool import KernelConstants, PooledLayer, PooledLinear, PoolRange, RawPool
from trimode.build.graph.results import REAL_TYPES, declare_results
from trimode.build.graph.split_products import SplitProducts
from trimode.build.graph.step_inputs import declare_adapter, declare_step
from trimode.engine.precision import Real
from trimode.model.config import ModelConfig
from trimode.model.step import RANKS, AttentionPattern, adapter_inputs, cache_inputs, cache_outputs, mask_words
from trimode.plugins.operators import (
    DOMAIN,
    AllReduce,
    Attend,
    DenseHead,
    DenseProduct,
    Embed,
    Int4Head,
    Int4Product,
    KvWrite,
    MergeCandidates,
    MergeSplits,
    Operator,
    Pattern,
    QkvProduct,
    RmsNorm,
    Rotations,
    SelectRows,
    SwiGlu,
)
from trimode.plugins.operators.dense_product import dense_split_count
from trimode.plugins.operators.norm_terms import MOST_NORM_TILES, norm_tiles

FLOAT, INT32, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL


class Stream(NamedTuple):
    """The residual stream [batch, step, hidden]. weighted, squares: what the operator that wrote it computed of the
    norm behind it, if the norm's reader can use them.
    """

    x: str
    weighted: str = ""
    squares: str = ""


class OperatorNetworkOptions(NamedTuple):
    """activations: type of activations, KV pool and adapter. top_k: candidates of a row. splits: parts of a sequence's
    KV rows that attention computes in parallel. rank: of the draft adapter; 0 without one.

    standard_results: standard operators compute the results from the logits, as :mod:`trimode.build.graph.network` has
    them with masks apart. standard_products: and products with weights that are not int4. capacity: KV rows, if they
    are fixed. ranks: among which the network is divided; ``config`` and the pool are those of one of them.
    """

    activations: Real
    top_k: int
    splits: int
    rank: int
    standard_results: bool = False
    standard_products: bool = False
    capacity: int | None = None
    ranks: int = 1


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
        linears = list(self.pool.linears())
        if not self.options.standard_results:
            linears.remove(self.pool.head)
        self.split_products = SplitProducts(graph, linears, self._counters())
        capacity = self.options.capacity or "capacity"
        cache_shape: Shape = ["batch", config.num_key_value_heads, capacity, config.head_dim]
        for name in cache_inputs(config.num_hidden_layers):
            graph.input(name, self.real, cache_shape)
        if self.has_adapter:
            self.adapter_scale = declare_adapter(graph, config, self.real, self.options.rank)
        if self.options.ranks > 1:
            graph.input(RANKS, INT64, [self.options.ranks + 1])

        layers = self.pool.layers
        stream = self._embedded(input_ids, layers[0])
        constants = [graph.pooled(entry) for entry in self.constants.rotations]
        length = config.rope_parameters.original_max_position_embeddings
        self.rotations = self._run(Rotations(), [position_ids, *constants], length=length)
        for index, layer in enumerate(layers):
            graph.scope = f"layers.{index}/"
            attended, x = self._attention(stream, layer, index), stream.x
            last = layer is layers[-1]
            if last:
                # From here on, the last layer needs only the rows with logits.
                x, attended = (
                    self._run(SelectRows(), [value, logit_rows], f"{name}_")[0]
                    for name, value in (("x", x), ("attended", attended))
                )
            stream = self._o_proj(attended, x, layer, index)
            activated = self._activated(stream, layer)
            next_norm = self.pool.norm if last else layers[index + 1].input_layernorm
            reader = self.pool.head if last else layers[index + 1].qkv_proj
            stream = self._residual(activated, layer.down_proj, "x", stream.x, next_norm, reader)
        graph.scope = "head/"
        self._head(stream)
        for name in cache_outputs(config.num_hidden_layers):
            graph.output(name, self.real, cache_shape)
        return graph.model()

    @property
    def has_adapter(self) -> bool:
        return self.options.rank > 0 and self.pattern == "bidirectional"

    @property
    def splits_adapter(self) -> bool:
        narrow = self.config.query_width, self.options.rank
        return self.has_adapter and not self.options.standard_products and dense_split_count(*narrow) > 1

    def _counters(self) -> dict[str, int]:
        """Those of launches that are no int4 products, by name."""
        layers = range(self.config.num_hidden_layers) if self.splits_adapter else ()
        return {f"layers.{index}/adapter": DenseProduct.counters(self.options.rank) for index in layers}

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
                return embed_function(operator)
            case Rotations():
                return rotations_function(attributes["length"], self.real)
            case RmsNorm():
                return rms_norm_function()
            case QkvProduct():
                return qkv_product_function(operator, self.config.head_dim)
            case Int4Head():
                return int4_head_function(operator, **attributes)
            case DenseHead():
                return dense_head_function(operator, **attributes)
            case Int4Product():
                return int4_product_function(operator)
            case DenseProduct():
                return dense_product_function(operator)
            case KvWrite():
                return kv_write_function(self.config.head_dim)
            case Attend():
                return attend_function(operator)
            case MergeSplits():
                return merge_function(operator)
            case SwiGlu():
                return swiglu_function()
            case SelectRows():
                return select_rows_function()
            case MergeCandidates():
                return merge_candidates_function(attributes["top_k"])
        raise ValueError(f"operator {operator.name} has no function")

    def _embedded(self, input_ids: str, first: PooledLayer) -> Stream:
        given = [input_ids, self.graph.pooled(self.pool.embed_tokens)]
        if not self._applies_norms(first.qkv_proj):
            return Stream(*self._run(Embed(), given))
        return Stream(*self._run(Embed(for_norm=True), [*given, self.graph.pooled(first.input_layernorm)]))

    def _applies_norms(self, linear: PooledLinear) -> bool:
        """Whether the product can divide by the root mean square of its input's rows."""
        return linear.scale is not None and norm_tiles(self.config.hidden_size) <= MOST_NORM_TILES

    def _normed(self, stream: Stream, weight: PoolRange, prefix: str = "") -> tuple[str, list[str]]:
        """What the matrices that read a norm multiply, and what remains of the norm for their products."""
        epsilon = self.graph.pooled(self.constants.epsilon)
        if stream.weighted:
            return stream.weighted, [stream.squares, epsilon]
        return self._run(RmsNorm(), [stream.x, self.graph.pooled(weight), epsilon], prefix)[0], []

    def _attention(self, stream: Stream, layer: PooledLayer, index: int) -> str:
        """Write the step's keys and values, and attend: [batch, step, query width], times AWQ's input scale of o."""
        config, splits = self.config, self.options.splits
        caches = cache_inputs(config.num_hidden_layers)[2 * index : 2 * index + 2]
        updated = cache_outputs(config.num_hidden_layers)[2 * index : 2 * index + 2]
        q = self._queries(stream, layer, caches, updated)
        visibility: Pattern = "masked" if self.pattern == "causal" else "bidirectional"
        parts = self._run(Attend(visibility), [q, *updated, self.write_indices, self.visibility], splits=splits)
        scale = layer.o_proj.input_scale
        scales = [] if scale is None else [self.graph.pooled(scale)]
        group = config.num_attention_heads // config.num_key_value_heads
        merge = MergeSplits(output_scale=scale is not None)
        return self._run(merge, [*parts, *scales], splits=splits, group=group)[0]

    def _queries(self, stream: Stream, layer: PooledLayer, caches: list[str], updated: list[str]) -> str:
        """Rotated queries; keys and values are written. With int4 weights, the product does both."""
        linear, (x, norm) = layer.qkv_proj, self._normed(stream, layer.input_layernorm)
        results, written = [f"{self.graph.scope}q"], [*self.rotations, self.write_indices, *caches]
        if not linear.paired:
            qkv = self._linear(x, linear, "qkv", norm=norm)[0]
            return self._run_into(KvWrite(), [qkv, *written], results, updated)[0]
        counters = self.split_products.counters(linear)
        operator = QkvProduct(split=counters is not None, normed=bool(norm))
        given = [x, *(self.graph.pooled(part) for part in linear.matrix()), *norm, *written]
        if counters is None:
            return self._run_into(operator, given, results, updated)[0]
        results.append(f"{self.graph.scope}qkv_partial")
        return self._run_into(operator, [*given, counters[0]], results, [*updated, *counters[1:]])[0]

    def _activated(self, stream: Stream, layer: PooledLayer) -> str:
        """The gated activation. With int4 weights, the product computes it."""
        x, norm = self._normed(stream, layer.post_attention_layernorm, "mlp_")
        found = self._linear(x, layer.gate_up_proj, "gate_up", norm=norm)[0]
        return found if layer.gate_up_proj.paired else self._run(SwiGlu(), [found])[0]

    def _o_proj(self, attended: str, residual: str, layer: PooledLayer, index: int) -> Stream:
        behind = (layer.post_attention_layernorm, layer.gate_up_proj)
        if not self.has_adapter:
            return self._residual(attended, layer.o_proj, "attention_x", residual, *behind)
        # The adapter reads the same input as the base matrix; its first matrix is divided by AWQ's input scale.
        down, up = adapter_inputs(index)
        narrow = self._narrow(attended, down)
        return self._residual(attended, layer.o_proj, "attention_x", residual, *behind, (narrow, up))

    def _narrow(self, attended: str, down: str) -> str:
        """The adapter's first product, times its scale."""
        given = [attended, down, self.adapter_scale]
        if self.options.standard_products:
            op = self.graph.op
            return op("Mul", op("MatMul", attended, down), op("Unsqueeze", self.adapter_scale, [1, 2]))
        if not self.splits_adapter:
            return self._run(DenseProduct(row_scale=True), given, "narrow_")[0]
        before, after = self.split_products.next(f"{self.graph.scope}adapter")
        results = [f"{self.graph.scope}{name}" for name in ("narrow_y", "narrow_partial")]
        return self._run_into(DenseProduct(split=True, row_scale=True), [*given, before], results, [after])[0]

    def _residual(
        self,
        x: str,
        linear: PooledLinear,
        result: str,
        residual: str,
        norm: PoolRange,
        reader: PooledLinear,
        adapter: tuple[str, str] | None = None,
    ) -> Stream:
        """x W + narrow up + residual, and what the product computes of the norm behind it. reader: of the norm.

        On one of several ranks, the product is a partial sum, and the sum of the ranks computes the rest.
        """
        if self.options.ranks > 1:
            partial = self._linear(x, linear, f"{result}_partial", None, adapter)[0]
            return self._sum(partial, result, residual, norm, reader)
        fused = linear.scale is not None and self._applies_norms(reader)
        weight = self.graph.pooled(norm) if fused else None
        return Stream(*self._linear(x, linear, result, residual, adapter, next_weight=weight)[: 3 if fused else 1])

    def _sum(self, partial: str, result: str, residual: str, norm: PoolRange, reader: PooledLinear) -> Stream:
        """The sum over all ranks and the residual stream."""
        operator, given = AllReduce(for_norm=self._applies_norms(reader)), [partial, RANKS, residual]
        given += [self.graph.pooled(norm)] if operator.for_norm else []
        results = [f"{self.graph.scope}{result}_{operand.name}" for operand in operator.outputs]
        self.graph.node(operator.name, given, results, domain=DOMAIN, **PARSER_ATTRIBUTES)
        return Stream(*results)

    def _linear(
        self,
        x: str,
        linear: PooledLinear,
        result: str,
        residual: str | None = None,
        adapter: tuple[str, str] | None = None,
        *,
        norm: Sequence[str] = (),
        next_weight: str | None = None,
    ) -> list[str]:
        """x W / rms + narrow up + residual, and further results.

        adapter: narrow [batch, step, rank] and up [rank, out]. norm, next_weight: as :class:`Int4Product` takes them.
        """
        terms = {"adapter": adapter is not None, "residual": residual is not None}
        given = [x, *(self.graph.pooled(part) for part in linear.matrix()), *norm, *(adapter or ())]
        given += [value for value in (residual, next_weight) if value is not None]
        if linear.scale is None:
            if self.options.standard_products:
                return [self._matmul(x, linear, residual, adapter)]
            return self._run(DenseProduct(**terms), given, f"{result}_")
        counters = self.split_products.counters(linear)
        terms |= {"split": counters is not None, "gated": linear.paired}
        operator = Int4Product(**terms, normed=bool(norm), for_norm=next_weight is not None)
        results = [f"{self.graph.scope}{result}_{operand.name}" for operand in operator.outputs if not operand.aliases]
        if counters is None:
            return self._run_into(operator, given, results)
        return self._run_into(operator, [*given, counters[0]], results, counters[1:])

    def _matmul(self, x: str, linear: PooledLinear, residual: str | None, adapter: tuple[str, str] | None) -> str:
        op = self.graph.op
        y = op("MatMul", x, self.graph.pooled(linear.weight))
        if adapter is not None:
            y = op("Add", y, op("MatMul", *adapter))
        return y if residual is None else op("Add", residual, y)

    def _head(self, stream: Stream) -> None:
        """Final norm, logits and candidates."""
        x, norm = self._normed(stream, self.pool.norm)
        head, top_k, mask_token = self.pool.head, self.options.top_k, self.config.mask_token_id
        if self.options.standard_results:
            logits = self._linear(x, head, "logits", norm=norm)[0]
            declare_results(self.graph, self.config, logits, self.options.activations, top_k, "apart")
            return
        token_mask = self.graph.input("token_mask", INT32, ["batch", "rows", mask_words(self.config.vocab_size)])
        asked_ids = self.graph.input("asked_ids", INT64, ["batch", "rows", "asked"])
        operator = DenseHead(masked=True) if head.scale is None else Int4Head(normed=bool(norm), masked=True)
        given = [x, *(self.graph.pooled(part) for part in head.matrix()), *norm, token_mask, asked_ids]
        tiles = [f"{self.graph.scope}{operand.name}" for operand in operator.outputs[:-1]]
        self._run_into(operator, given, [*tiles, "asked_logits"], top_k=top_k, mask_token=mask_token)
        self._run_into(MergeCandidates(), tiles, ["top_logits", "top_tokens", "log_sum_exp"], top_k=top_k)
        self.graph.output("top_logits", FLOAT, ["batch", "rows", top_k])
        self.graph.output("top_tokens", INT64, ["batch", "rows", top_k])
        self.graph.output("log_sum_exp", FLOAT, ["batch", "rows"])
        self.graph.output("asked_logits", FLOAT, ["batch", "rows", "asked"])
