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
from trimode.plugins.operators import (
    DOMAIN,
    Attend,
    DenseHead,
    DenseProduct,
    Embed,
    Int4Head,
    Int4Product,
    KvWrite,
    MergeCandidates,
    MergeSplits,
    Pattern,
    QkvProduct,
    RmsNorm,
    Rotations,
    SelectRows,
    SwiGlu,
)
from trimode.plugins.operators.candidates import NEVER, TILE
from trimode.plugins.operators.int4_product import PAIRED

# TensorRT's parser maps a node to the plugin of the node's name in `plugin_namespace`, and prefers it to a function.
PARSER_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
ATTRIBUTES = tuple(PARSER_ATTRIBUTES)
_FLOAT, _INT32, _INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


def kv_write_function(head_dim: int) -> onnx.FunctionProto:
    body = FunctionBuilder(KvWrite(), ATTRIBUTES)
    op = body.op
    heads = op("Reshape", "qkv", [0, 0, -1, head_dim])
    _write_heads(body, op("Transpose", heads, perm=[0, 2, 1, 3]))
    return body.function()


def _write_heads(body: FunctionBuilder, heads: str) -> None:
    """Rotate queries and keys, and write the keys and values. heads: [B, HQ + 2 HKV, S, D]."""
    op = body.op
    kv_heads = body.dims("k_cache", 1, 2)
    query_heads = op("Sub", body.dims(heads, 1, 2), op("Mul", kv_heads, [2]))
    sizes = op("Concat", query_heads, kv_heads, kv_heads, axis=0)
    body.node("Split", [heads, sizes], ["query", "key", "value"], axis=1)
    body.node("RotaryEmbedding", ["query", "query_cos", "query_sin"], ["q"])
    body.node("RotaryEmbedding", ["key", "key_cos", "key_sin"], ["rotated_key"])
    for cache, rows in (("k_cache", "rotated_key"), ("v_cache", "value")):
        body.node("TensorScatter", [cache, rows, "write_indices"], [f"{cache}_out"], axis=2, mode="linear")


def attend_function(operator: Attend) -> onnx.FunctionProto:
    body = FunctionBuilder(operator, ATTRIBUTES)
    op, pattern = body.op, operator.pattern
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


def merge_function(operator: MergeSplits) -> onnx.FunctionProto:
    body = FunctionBuilder(operator, ATTRIBUTES)
    op = body.op
    weights, _ = _softmax(body, "log_sum_exp", axis=1)
    weights = op("Unsqueeze", weights, [-1])
    parts = op("Where", op("Greater", weights, 0.0), op("Cast", "partial", to=_FLOAT), 0.0)
    merged = op("ReduceSum", op("Mul", parts, weights), [1], keepdims=0)
    attended = op("Reshape", op("Transpose", merged, perm=[0, 2, 1, 3]), [0, 0, -1])
    if any(operand.name == "output_scale" for operand in operator.inputs):
        attended = op("Mul", attended, "output_scale")
    body.node("CastLike", [attended, "partial"], ["attended"])
    return body.function()


def int4_product_function(operator: Int4Product) -> onnx.FunctionProto:
    body, inputs = FunctionBuilder(operator, ATTRIBUTES), {operand.name for operand in operator.inputs}
    op = body.op
    y = _product(body, operator)
    if "narrow" in inputs:
        y = op("Add", y, op("MatMul", op("Cast", "narrow", to=_FLOAT), op("Cast", "adapter_up", to=_FLOAT)))
    if "residual" in inputs:
        y = op("Add", y, op("Cast", "residual", to=_FLOAT))
    if operator.gated:
        gate, up = _halves(body, y)
        y = op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
    body.node("CastLike", [y, "x"], ["y"])
    if operator.for_norm:
        _write_norm_terms(body, "y")
    return body.function()


def _write_norm_terms(body: FunctionBuilder, x: str) -> None:
    """The sums of the squares have one tile."""
    op = body.op
    body.node("Mul", [x, "next_weight"], ["weighted"])
    wide = op("Cast", x, to=_FLOAT)
    squares = op("ReduceSum", op("Mul", wide, wide), [-1], keepdims=0)
    body.node("Reshape", [squares, [1, -1]], ["next_squares"])


def _product(body: FunctionBuilder, operator: Int4Product) -> str:
    """x W in fp32, divided by the norm's root mean square if there is one. K is summed in one part, so ``partial`` has
    one.
    """
    op, inputs = body.op, {operand.name for operand in operator.inputs}
    powers = body.constant(np.array([16**j for j in range(8)], np.int32), "powers")
    eight, sixteen = (body.constant(np.array(value, np.int32), f"int32_{value}") for value in (8, 16))
    # Mod in place of shifts: words are signed, and Mod's remainder is never negative.
    words = op("Unsqueeze", "packed", [4])
    nibbles = op("Mod", op("Div", op("Sub", words, op("Mod", words, powers)), powers), sixteen)
    # [tiles, units, columns, words, j] to [K, tiles * columns]
    rows = op("Transpose", op("Sub", nibbles, eight), perm=[1, 4, 3, 0, 2])
    rows = op(
        "Reshape", rows, op("Concat", [-1], op("Mul", body.dims("packed", 0, 1), body.dims("packed", 2, 3)), axis=0)
    )
    integers = op("Slice", rows, [0], body.dims("scale", 1, 2), [1])
    groups = op("Concat", body.dims("scale", 0, 1), [-1], body.dims("scale", 1, 2), axis=0)
    weight = op("Mul", op("Reshape", op("Cast", integers, to=_FLOAT), groups), op("Unsqueeze", "scale", [1]))
    weight = op("Reshape", weight, op("Concat", [-1], body.dims("scale", 1, 2), axis=0))
    y = op("MatMul", op("Cast", "x", to=_FLOAT), weight)
    if "squares" in inputs:
        width = op("Cast", op("Shape", "x", start=-1), to=_FLOAT)
        mean = op("Div", op("ReduceSum", "squares", [0], keepdims=0), width)
        rms = op("Sqrt", op("Add", mean, "epsilon"))
        y = op("Div", y, op("Reshape", rms, op("Concat", body.dims("x", 0, -1), [1], axis=0)))
    if operator.split:
        _write_one_part(body, y, body.dims("scale", 1, 2))
    return y


def _write_one_part(body: FunctionBuilder, y: str, columns: str) -> None:
    part = body.op("Reshape", y, body.op("Concat", [-1], columns, axis=0))
    body.node("Unsqueeze", [part, [0]], ["partial"])
    body.node("Identity", ["counters"], ["counters_out"])


def _halves(body: FunctionBuilder, y: str) -> tuple[str, str]:
    """The first and the second columns of the pairs of ``y``, [.., N] each made [.., N / 2]."""
    op = body.op
    pairs = op("Reshape", y, op("Concat", body.dims(y, 0, -1), [-1, 2, PAIRED], axis=0))
    shape = op("Concat", body.dims(y, 0, -1), [-1], axis=0)
    first, second = (op("Reshape", op("Gather", pairs, half, axis=-2), shape) for half in (0, 1))
    return first, second


def qkv_product_function(operator: QkvProduct, head_dim: int) -> onnx.FunctionProto:
    body = FunctionBuilder(operator, ATTRIBUTES)
    op = body.op
    halves = [op("Reshape", half, [0, 0, -1, head_dim // 2]) for half in _halves(body, _product(body, operator))]
    heads = op("CastLike", op("Concat", *halves, axis=-1), "x")
    _write_heads(body, op("Transpose", heads, perm=[0, 2, 1, 3]))
    return body.function()


def embed_function(operator: Embed) -> onnx.FunctionProto:
    body = FunctionBuilder(operator, ATTRIBUTES)
    body.node("Gather", ["table", "input_ids"], ["embedded"])
    if operator.for_norm:
        _write_norm_terms(body, "embedded")
    return body.function()


def select_rows_function() -> onnx.FunctionProto:
    body = FunctionBuilder(SelectRows(), ATTRIBUTES)
    body.node("GatherND", ["x", body.op("Unsqueeze", "logit_rows", [2])], ["selected"], batch_dims=1)
    return body.function()


def rotations_function(length: int, real: int) -> onnx.FunctionProto:
    """length: the node's attribute. real: ONNX type of the outputs, since no input has it."""
    body = FunctionBuilder(Rotations(), ATTRIBUTES)
    op = body.op
    positions = op("Unsqueeze", op("Cast", "position_ids", to=_FLOAT), [2])
    angles = op("Mul", positions, "frequencies")
    last = op("Sub", op("Shape", "query_scales"), [1])
    query_scale = op("Gather", "query_scales", op("Min", op("Div", "position_ids", length), last))
    for kind, function in (("cos", "Cos"), ("sin", "Sin")):
        table = op(function, angles)
        scaled = op("Mul", table, op("Unsqueeze", query_scale, [2]))
        body.node("Cast", [scaled], [f"query_{kind}"], to=real)
        body.node("Cast", [op("Mul", table, "key_scale")], [f"key_{kind}"], to=real)
    return body.function()


def rms_norm_function() -> onnx.FunctionProto:
    body = FunctionBuilder(RmsNorm(), ATTRIBUTES)
    op = body.op
    x = op("Cast", "x", to=_FLOAT)
    mean = op("ReduceMean", op("Mul", x, x), [-1], keepdims=1)
    unit = op("Div", x, op("Sqrt", op("Add", mean, "epsilon")))
    body.node("Mul", [op("CastLike", unit, "x"), "weight"], ["normed"])
    return body.function()


def swiglu_function() -> onnx.FunctionProto:
    body = FunctionBuilder(SwiGlu(), ATTRIBUTES)
    op = body.op
    body.node("Split", [op("Cast", "gate_up", to=_FLOAT)], ["gate", "up"], axis=-1, num_outputs=2)
    activated = op("Mul", op("Mul", "gate", op("Sigmoid", "gate")), "up")
    body.node("CastLike", [activated, "gate_up"], ["activated"])
    return body.function()


def dense_product_function(operator: DenseProduct) -> onnx.FunctionProto:
    body, inputs = FunctionBuilder(operator, ATTRIBUTES), {operand.name for operand in operator.inputs}
    op = body.op
    y = op("MatMul", op("Cast", "x", to=_FLOAT), op("Cast", "weight", to=_FLOAT))
    if operator.split:
        _write_one_part(body, y, body.dims("weight", 1, 2))
    if "row_scale" in inputs:
        y = op("Mul", y, op("Unsqueeze", op("Cast", "row_scale", to=_FLOAT), [1, 2]))
    if "narrow" in inputs:
        y = op("Add", y, op("MatMul", op("Cast", "narrow", to=_FLOAT), op("Cast", "adapter_up", to=_FLOAT)))
    if "residual" in inputs:
        y = op("Add", y, op("Cast", "residual", to=_FLOAT))
    body.node("CastLike", [y, "x"], ["y"])
    return body.function()


def int4_head_function(operator: Int4Head, *, top_k: int, mask_token: int) -> onnx.FunctionProto:
    """top_k, mask_token: the node's attributes."""
    body = FunctionBuilder(operator, ATTRIBUTES)
    _write_head_results(body, _product(body, operator), body.dims("scale", 1, 2), operator.masked, top_k, mask_token)
    return body.function()


def dense_head_function(operator: DenseHead, *, top_k: int, mask_token: int) -> onnx.FunctionProto:
    """top_k, mask_token: the node's attributes."""
    body = FunctionBuilder(operator, ATTRIBUTES)
    logits = body.op("MatMul", body.op("Cast", "x", to=_FLOAT), body.op("Cast", "weight", to=_FLOAT))
    _write_head_results(body, logits, body.dims("weight", 1, 2), operator.masked, top_k, mask_token)
    return body.function()


def _write_head_results(
    body: FunctionBuilder, logits: str, vocabulary: str, masked: bool, top_k: int, mask_token: int
) -> None:
    """logits: [B, L, V] in fp32. vocabulary: V, as a vector."""
    op = body.op
    tokens = op("Range", 0, op("Squeeze", vocabulary), 1)
    legal = op("Not", op("Equal", tokens, mask_token))
    if masked:
        bits = body.constant((1 << np.arange(32, dtype=np.uint32)).view(np.int32), "bits")
        none = body.constant(np.array(0, np.int32), "int32_0")
        clear = op("Equal", op("BitwiseAnd", op("Unsqueeze", "token_mask", [3]), bits), none)
        named = op("Reshape", op("Not", clear), [0, 0, -1])
        legal = op("And", legal, op("Slice", named, [0], vocabulary, [2]))
    possible = op("Where", legal, logits, NEVER)
    # The remainder of a negative number is not negative.
    missing = op("Mod", op("Neg", vocabulary), TILE)
    padding = op("Concat", [0, 0, 0, 0, 0], missing, axis=0)
    tiles = op("Reshape", op("Pad", possible, padding, NEVER), [0, 0, -1, TILE])
    body.node("ReduceMax", [tiles, [-1]], ["tile_logits"], keepdims=0)
    places = op("ArgMax", tiles, axis=-1, keepdims=0)
    first = op("Mul", op("Range", 0, op("Squeeze", body.dims(tiles, 2, 3)), 1), TILE)
    body.node("Cast", [op("Add", places, first)], ["tile_tokens"], to=_INT32)
    _log_sum_exp(body, tiles, "tile_sums")
    if top_k > 1:
        body.node("Identity", [possible], ["logits"])
    else:
        body.node("Slice", [possible, [0], [0], [2]], ["logits"])
    body.node("GatherElements", [logits, "asked_ids"], ["asked_logits"], axis=2)


def merge_candidates_function(top_k: int) -> onnx.FunctionProto:
    """top_k: the node's attribute."""
    body = FunctionBuilder(MergeCandidates(), ATTRIBUTES)
    op = body.op
    if top_k > 1:
        body.node("TopK", ["logits", [top_k]], ["top_logits", "top_tokens"], axis=-1)
    else:
        body.node("TopK", ["tile_logits", [1]], ["top_logits", "places"], axis=-1)
        tokens = op("GatherElements", "tile_tokens", "places", axis=2)
        body.node("Cast", [tokens], ["top_tokens"], to=_INT64)
    _log_sum_exp(body, "tile_sums", "log_sum_exp")
    return body.function()


def _log_sum_exp(body: FunctionBuilder, values: str, result: str) -> None:
    """Of the last dimension. Of values that are all NEVER it is NEVER, since the logarithm is lost in rounding."""
    op = body.op
    best = op("ReduceMax", values, [-1], keepdims=1)
    total = op("ReduceSum", op("Exp", op("Sub", values, best)), [-1], keepdims=0)
    body.node("Add", [op("Log", total), op("Squeeze", best, [-1])], [result])
