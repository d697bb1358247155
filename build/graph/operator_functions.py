"""The plugins' operators as ONNX functions of standard operators, by which any ONNX executor computes what TensorRT's
plugins do.

A body is a definition, not a fast way: attention is done in one split, int4 weights are unpacked on every pass. Rows
that no token sees may hold anything, NaN included; a token that sees nothing gets zeros. Names are the operands' of
:mod:`trimode.plugins.operators`. Two attributes are for TensorRT's parser: it maps a node to the plugin of the node's
name in ``plugin_namespace``, and prefers a plugin to a function of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trimode.build.graph.onnx_graph import OPSET
from trimode.plugins.operators import DOMAIN, Attend, Int4Product, KvWrite, MergeSplits, Operator, Pattern

PARSER_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
_FLOAT, _INT32 = TensorProto.FLOAT, TensorProto.INT32


class _Body:
    """Collects the nodes of one function; every method that makes a value returns its name."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self._nodes: list[onnx.NodeProto] = []

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        result = f"{kind}_{len(self._nodes)}"
        self.node(kind, inputs, [result], **attributes)
        return result

    def node(self, kind: str, inputs: Sequence[str], results: Sequence[str], **attributes: object) -> None:
        self._nodes.append(helper.make_node(kind, list(inputs), list(results), **attributes))

    def ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def integer(self, value: int, dtype: type[np.int32 | np.int64] = np.int64) -> str:
        return self._constant(np.array(value, dtype))

    def real(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _constant(self, array: NDArray[np.generic]) -> str:
        return self.op("Constant", value=numpy_helper.from_array(array))

    def dims(self, x: str, start: int, end: int) -> str:
        return self.op("Shape", x, start=start, end=end)

    def function(self) -> onnx.FunctionProto:
        return helper.make_function(
            DOMAIN,
            self._operator.name,
            [operand.name for operand in self._operator.inputs],
            [operand.name for operand in self._operator.outputs],
            self._nodes,
            [helper.make_opsetid("", OPSET)],
            attributes=[*PARSER_ATTRIBUTES, *self._operator.attributes],
        )


def kv_write_function(head_dim: int) -> onnx.FunctionProto:
    body = _Body(KvWrite())
    op = body.op
    heads = op("Reshape", "qkv", body.ints(0, 0, -1, head_dim))
    heads = op("Transpose", heads, perm=[0, 2, 1, 3])
    kv_heads = body.dims("k_cache", 1, 2)
    query_heads = op("Sub", body.dims(heads, 1, 2), op("Mul", kv_heads, body.ints(2)))
    sizes = op("Concat", query_heads, kv_heads, kv_heads, axis=0)
    body.node("Split", [heads, sizes], ["query", "key", "value"], axis=1)
    body.node("RotaryEmbedding", ["query", "query_cos", "query_sin"], ["q"])
    body.node("RotaryEmbedding", ["key", "key_cos", "key_sin"], ["rotated_key"])
    for cache, rows in (("k_cache", "rotated_key"), ("v_cache", "value")):
        body.node("TensorScatter", [cache, rows, "write_indices"], [f"{cache}_out"], axis=2, mode="linear")
    return body.function()


def attend_function(pattern: Pattern) -> onnx.FunctionProto:
    body = _Body(Attend(pattern))
    op = body.op
    # Queries that share a key-value head are rows of one matrix.
    folded = op("Concat", body.dims("k_cache", 0, 2), body.ints(-1), body.dims("q", 3, 4), axis=0)
    queries = op("Cast", op("Reshape", "q", folded), to=_FLOAT)
    keys, values = op("Cast", "k_cache", to=_FLOAT), op("Cast", "v_cache", to=_FLOAT)
    logits = op("MatMul", queries, op("Transpose", keys, perm=[0, 1, 3, 2]))
    logits = op("Reshape", logits, op("Concat", body.dims("q", 0, 3), body.dims("k_cache", 2, 3), axis=0))
    visible = _visible(body, pattern)
    logits = op("Where", visible, logits, body.real(-np.inf))
    weights, log_sum_exp = _softmax(body, logits, axis=-1)
    rows = op("Concat", body.dims("k_cache", 0, 2), body.ints(-1), body.dims("k_cache", 2, 3), axis=0)
    weights = op("Reshape", weights, rows)
    seen = op("ReduceMax", op("Cast", visible, to=_INT32), body.ints(2), keepdims=1)
    seen = op("Cast", op("Transpose", seen, perm=[0, 1, 3, 2]), to=TensorProto.BOOL)
    values = op("Where", seen, values, body.real(0))
    attended = op("Reshape", op("MatMul", weights, values), op("Shape", "q"))
    body.node("Unsqueeze", [op("CastLike", attended, "q"), body.ints(1)], ["partial"])
    body.node("Unsqueeze", [op("Squeeze", log_sum_exp, body.ints(-1)), body.ints(1)], ["log_sum_exp"])
    return body.function()


def _softmax(body: _Body, logits: str, axis: int) -> tuple[str, str]:
    """Weights along ``axis``, all 0 where all logits are -inf, and the log-sum-exp."""
    op = body.op
    axes = body.ints(axis)
    best = op("Max", op("ReduceMax", logits, axes, keepdims=1), body.real(float(np.finfo(np.float32).min)))
    weights = op("Exp", op("Sub", logits, best))
    total = op("ReduceSum", weights, axes, keepdims=1)
    return op("Div", weights, op("Max", total, body.real(1))), op("Add", op("Log", total), best)


def _visible(body: _Body, pattern: Pattern) -> str:
    """Which rows of the pool each token sees, to be broadcast over [B, HQ, S, C]."""
    op = body.op
    step = body.dims("q", 2, 3)
    rows = op("Range", body.integer(0), op("Squeeze", body.dims("k_cache", 2, 3)), body.integer(1))
    # 0 is the step's first row; committed rows are negative.
    row_in_step = op("Sub", rows, op("Unsqueeze", "write_indices", body.ints(1, 2, 3)))
    if pattern == "bidirectional":
        return op("Less", row_in_step, op("Unsqueeze", "step_lengths", body.ints(1, 2, 3)))
    if pattern == "causal":
        tokens = op("Range", body.integer(0), op("Squeeze", step), body.integer(1))
        return op("LessOrEqual", row_in_step, op("Unsqueeze", tokens, body.ints(1)))
    zero, last = body.integer(0), op("Sub", step, body.ints(1))
    column = op("Min", op("Max", row_in_step, zero), last)
    shape = op("Concat", body.dims("q", 0, 1), body.ints(1), step, body.dims("k_cache", 2, 3), axis=0)
    chosen = op("GatherElements", op("Unsqueeze", "block_mask", body.ints(1)), op("Expand", column, shape), axis=3)
    inside = op("And", chosen, op("Less", row_in_step, step))
    return op("Or", op("Less", row_in_step, zero), inside)


def merge_function() -> onnx.FunctionProto:
    body = _Body(MergeSplits())
    op = body.op
    weights, _ = _softmax(body, "log_sum_exp", axis=1)
    weights = op("Unsqueeze", weights, body.ints(-1))
    parts = op("Where", op("Greater", weights, body.real(0)), op("Cast", "partial", to=_FLOAT), body.real(0))
    merged = op("ReduceSum", op("Mul", parts, weights), body.ints(1), keepdims=0)
    merged = op("CastLike", op("Transpose", merged, perm=[0, 2, 1, 3]), "partial")
    body.node("Reshape", [merged, body.ints(0, 0, -1)], ["attended"])
    return body.function()


def int4_product_function(operator: Int4Product) -> onnx.FunctionProto:
    body, inputs = _Body(operator), {operand.name for operand in operator.inputs}
    op = body.op
    packed = op("Cast", "packed", to=_INT32)
    eight, sixteen = body.integer(8, np.int32), body.integer(16, np.int32)
    # Mod and not a shift: bytes are signed, and a remainder is not negative.
    even = op("Sub", op("Mod", op("Add", packed, eight), sixteen), eight)
    odd = op("Div", op("Sub", packed, op("Mod", packed, sixteen)), sixteen)
    pairs = op("Concat", op("Unsqueeze", even, body.ints(2)), op("Unsqueeze", odd, body.ints(2)), axis=2)
    scale = op("Cast", "scale", to=_FLOAT)
    groups = op("Concat", body.dims("scale", 0, 1), body.ints(-1), body.dims("scale", 1, 2), axis=0)
    weight = op("Mul", op("Reshape", op("Cast", pairs, to=_FLOAT), groups), op("Unsqueeze", scale, body.ints(1)))
    weight = op("Reshape", weight, op("Concat", body.ints(-1), body.dims("scale", 1, 2), axis=0))
    x = op("Mul", "x", "input_scale") if "input_scale" in inputs else "x"
    y = op("MatMul", op("Cast", x, to=_FLOAT), weight)
    if "narrow" in inputs:
        y = op("Add", y, op("MatMul", op("Cast", "narrow", to=_FLOAT), op("Cast", "adapter_up", to=_FLOAT)))
    if "residual" in inputs:
        y = op("Add", y, op("Cast", "residual", to=_FLOAT))
    body.node("CastLike", [y, "x"], ["y"])
    return body.function()
