"""The plugins' operators as ONNX functions of standard operators. With them, any ONNX executor can run the graphs.

The functions are written for clarity, not for speed: attention is computed in one split, and int4 weights are unpacked
in every pass. Rows that no token attends to may hold any value, including NaN. A token that attends to no row gets
zeros. The names of inputs and outputs are those of :mod:`trimode.plugins.operators`.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from trimode.build.graph.onnx_builder import FunctionBuilder
from trimode.plugins.operators import DOMAIN, Attend, Int4Product, KvWrite, MergeSplits, Pattern

# TensorRT's parser maps a node to the plugin of the node's name in `plugin_namespace`, and prefers it to a function.
PARSER_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
ATTRIBUTES = tuple(PARSER_ATTRIBUTES)
_FLOAT, _INT32 = TensorProto.FLOAT, TensorProto.INT32


def kv_write_function(head_dim: int) -> onnx.FunctionProto:
    body = FunctionBuilder(KvWrite(), ATTRIBUTES)
    op = body.op
    heads = op("Reshape", "qkv", [0, 0, -1, head_dim])
    heads = op("Transpose", heads, perm=[0, 2, 1, 3])
    kv_heads = body.dims("k_cache", 1, 2)
    query_heads = op("Sub", body.dims(heads, 1, 2), op("Mul", kv_heads, [2]))
    sizes = op("Concat", query_heads, kv_heads, kv_heads, axis=0)
    body.node("Split", [heads, sizes], ["query", "key", "value"], axis=1)
    body.node("RotaryEmbedding", ["query", "query_cos", "query_sin"], ["q"])
    body.node("RotaryEmbedding", ["key", "key_cos", "key_sin"], ["rotated_key"])
    for cache, rows in (("k_cache", "rotated_key"), ("v_cache", "value")):
        body.node("TensorScatter", [cache, rows, "write_indices"], [f"{cache}_out"], axis=2, mode="linear")
    return body.function()


def attend_function(pattern: Pattern) -> onnx.FunctionProto:
    body = FunctionBuilder(Attend(pattern), ATTRIBUTES)
    op = body.op
    # Queries that share a KV head become rows of one matrix.
    folded = op("Concat", body.dims("k_cache", 0, 2), [-1], body.dims("q", 3, 4), axis=0)
    queries = op("Cast", op("Reshape", "q", folded), to=_FLOAT)
    keys, values = op("Cast", "k_cache", to=_FLOAT), op("Cast", "v_cache", to=_FLOAT)
    logits = op("MatMul", queries, op("Transpose", keys, perm=[0, 1, 3, 2]))
    logits = op("Reshape", logits, op("Concat", body.dims("q", 0, 3), body.dims("k_cache", 2, 3), axis=0))
    visible = _visible(body, pattern)
    logits = op("Where", visible, logits, -np.inf)
    weights, log_sum_exp = _softmax(body, logits, axis=-1)
    rows = op("Concat", body.dims("k_cache", 0, 2), [-1], body.dims("k_cache", 2, 3), axis=0)
    weights = op("Reshape", weights, rows)
    seen = op("ReduceMax", op("Cast", visible, to=_INT32), [2], keepdims=1)
    seen = op("Cast", op("Transpose", seen, perm=[0, 1, 3, 2]), to=TensorProto.BOOL)
    values = op("Where", seen, values, 0.0)
    attended = op("Reshape", op("MatMul", weights, values), op("Shape", "q"))
    body.node("Unsqueeze", [op("CastLike", attended, "q"), [1]], ["partial"])
    body.node("Unsqueeze", [op("Squeeze", log_sum_exp, [-1]), [1]], ["log_sum_exp"])
    return body.function()


def _softmax(body: FunctionBuilder, logits: str, axis: int) -> tuple[str, str]:
    """Weights along ``axis``, all 0 where all logits are -inf, and the log-sum-exp."""
    op = body.op
    best = op("Max", op("ReduceMax", logits, [axis], keepdims=1), float(np.finfo(np.float32).min))
    weights = op("Exp", op("Sub", logits, best))
    total = op("ReduceSum", weights, [axis], keepdims=1)
    return op("Div", weights, op("Max", total, 1.0)), op("Add", op("Log", total), best)


def _visible(body: FunctionBuilder, pattern: Pattern) -> str:
    """Which rows of the pool each token attends to, broadcastable to [B, HQ, S, C]."""
    op = body.op
    step = body.dims("q", 2, 3)
    rows = op("Range", 0, op("Squeeze", body.dims("k_cache", 2, 3)), 1)
    # The step's first row is 0; committed rows are negative.
    row_in_step = op("Sub", rows, op("Unsqueeze", "write_indices", [1, 2, 3]))
    if pattern == "bidirectional":
        return op("Less", row_in_step, op("Unsqueeze", "step_lengths", [1, 2, 3]))
    if pattern == "causal":
        tokens = op("Range", 0, op("Squeeze", step), 1)
        return op("LessOrEqual", row_in_step, op("Unsqueeze", tokens, [1]))
    column = op("Min", op("Max", row_in_step, 0), op("Sub", step, [1]))
    shape = op("Concat", body.dims("q", 0, 1), [1], step, body.dims("k_cache", 2, 3), axis=0)
    chosen = op("GatherElements", op("Unsqueeze", "block_mask", [1]), op("Expand", column, shape), axis=3)
    inside = op("And", chosen, op("Less", row_in_step, step))
    return op("Or", op("Less", row_in_step, 0), inside)


def merge_function() -> onnx.FunctionProto:
    body = FunctionBuilder(MergeSplits(), ATTRIBUTES)
    op = body.op
    weights, _ = _softmax(body, "log_sum_exp", axis=1)
    weights = op("Unsqueeze", weights, [-1])
    parts = op("Where", op("Greater", weights, 0.0), op("Cast", "partial", to=_FLOAT), 0.0)
    merged = op("ReduceSum", op("Mul", parts, weights), [1], keepdims=0)
    merged = op("CastLike", op("Transpose", merged, perm=[0, 2, 1, 3]), "partial")
    body.node("Reshape", [merged, [0, 0, -1]], ["attended"])
    return body.function()


def int4_product_function(operator: Int4Product) -> onnx.FunctionProto:
    body, inputs = FunctionBuilder(operator, ATTRIBUTES), {operand.name for operand in operator.inputs}
    op = body.op
    packed = op("Cast", "packed", to=_INT32)
    eight, sixteen = (body.constant(np.array(value, np.int32), f"int32_{value}") for value in (8, 16))
    # Mod in place of a shift: bytes are signed, and Mod's remainder is never negative.
    even = op("Sub", op("Mod", op("Add", packed, eight), sixteen), eight)
    odd = op("Div", op("Sub", packed, op("Mod", packed, sixteen)), sixteen)
    pairs = op("Concat", op("Unsqueeze", even, [2]), op("Unsqueeze", odd, [2]), axis=2)
    scale = op("Cast", "scale", to=_FLOAT)
    groups = op("Concat", body.dims("scale", 0, 1), [-1], body.dims("scale", 1, 2), axis=0)
    weight = op("Mul", op("Reshape", op("Cast", pairs, to=_FLOAT), groups), op("Unsqueeze", scale, [1]))
    weight = op("Reshape", weight, op("Concat", [-1], body.dims("scale", 1, 2), axis=0))
    x = op("Mul", "x", "input_scale") if "input_scale" in inputs else "x"
    y = op("MatMul", op("Cast", x, to=_FLOAT), weight)
    if "narrow" in inputs:
        y = op("Add", y, op("MatMul", op("Cast", "narrow", to=_FLOAT), op("Cast", "adapter_up", to=_FLOAT)))
    if "residual" in inputs:
        y = op("Add", y, op("Cast", "residual", to=_FLOAT))
    body.node("CastLike", [y, "x"], ["y"])
    return body.function()
