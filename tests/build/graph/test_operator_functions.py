"""Each operator's function in ONNX Runtime equals the reference of its kernel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from tests.support.kernel_cases import HEAD_MASK_TOKEN, head_inputs
from trimode.build.graph.onnx_builder import IR_VERSION, OPSET
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
from trimode.plugins.operators import (
    DOMAIN,
    OPERATORS,
    Attend,
    DenseProduct,
    Embed,
    Head,
    Int4Head,
    Int4Product,
    MergeSplits,
    Pattern,
    QkvProduct,
)
from trimode.plugins.operators.candidates import NEVER, TILE
from trimode.plugins.reference import (
    attention,
    candidates,
    dense_product,
    embed,
    head_product,
    int4_product,
    kv_write,
    norm_terms,
    qkv_product,
    rms_norm,
    rotations,
    select_rows,
    swiglu,
)

BATCH, STEP, KV_HEADS, GROUP, SIZE, CAPACITY = 3, 5, 2, 3, 16, 24
HEADS = KV_HEADS * GROUP
COMMITTED = np.array([0, 7, 19])
# Of the nodes; the functions below are made with them.
TOP_K, LENGTH = 5, 16384
ATTRIBUTES = {"top_k": TOP_K, "mask_token": HEAD_MASK_TOKEN, "length": LENGTH}


def execute(
    function: onnx.FunctionProto, inputs: Mapping[str, NDArray[np.generic]], types: Mapping[str, int] = {}
) -> list[NDArray[np.generic]]:
    """One node of the function; its inputs are the graph's. types: of outputs that are not fp32."""
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    attributes = {
        name: value
        for name, value in {**PARSER_ATTRIBUTES, "splits": 4, "group": GROUP, **ATTRIBUTES}.items()
        if name in function.attribute
    }
    node = helper.make_node(function.name, list(function.input), list(function.output), domain=DOMAIN, **attributes)
    outputs = [
        helper.make_tensor_value_info(name, types.get(name, onnx.TensorProto.FLOAT), None) for name in function.output
    ]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "one", values, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[function])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[NDArray[np.generic]] = session.run(None, dict(inputs))
    return found


def near(found: NDArray[np.generic], expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=2e-5)


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def test_kv_write() -> None:
    width, cache = (HEADS + 2 * KV_HEADS) * SIZE, (BATCH, KV_HEADS, CAPACITY, SIZE)
    inputs: dict[str, NDArray[np.generic]] = {"qkv": random(BATCH, STEP, width)}
    for seed, name in enumerate(("query_cos", "query_sin", "key_cos", "key_sin")):
        inputs[name] = np.random.default_rng(seed).standard_normal((BATCH, STEP, SIZE // 2), np.float32)
    inputs |= {"write_indices": COMMITTED, "k_cache": random(*cache), "v_cache": random(*cache) + 1}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
    q = kv_write.kv_write(**tensors)
    for found, expected in zip(
        execute(kv_write_function(SIZE), inputs), (q, tensors["k_cache"], tensors["v_cache"]), strict=True
    ):
        near(found, expected)


@pytest.mark.parametrize(
    ("pattern", "blind"),
    [("causal", False), ("bidirectional", False), ("bidirectional", True), ("masked", False), ("masked", True)],
)
def test_attention(pattern: Pattern, blind: bool) -> None:
    """Both operators together, because executors may divide splits differently. Rows that no token attends to are NaN.

    blind: some tokens attend to no row.
    """
    cache = (BATCH, KV_HEADS, CAPACITY, SIZE)
    inputs: dict[str, NDArray[np.generic]] = {
        "q": random(BATCH, HEADS, STEP, SIZE),
        "k_cache": random(*cache),
        "v_cache": random(*cache) + 1,
        "write_indices": COMMITTED,
    }
    extra: dict[str, NDArray[np.generic]] = {}
    written = COMMITTED + STEP
    if pattern == "bidirectional":
        extra = {"step_lengths": (lengths := np.array([0 if blind else 5, 1, 3]))}
        written = COMMITTED + lengths
    if pattern == "masked":
        extra = {"block_mask": (mask := (random(BATCH, STEP, STEP) > 0) | np.eye(STEP, dtype=np.bool_))}
        if blind:
            mask[0, 1:3] = False
    empty = np.arange(CAPACITY) >= written[:, None]
    for name in ("k_cache", "v_cache"):
        inputs[name] = np.where(empty[:, None, :, None], np.float32(np.nan), inputs[name])
    tensors = {name: torch.from_numpy(array) for name, array in {**inputs, **extra}.items()}
    partial, log_sum_exp = execute(attend_function(Attend(pattern)), {**inputs, **extra})
    (attended,) = execute(merge_function(MergeSplits()), {"partial": partial, "log_sum_exp": log_sum_exp})
    expected = attention.attend(**tensors)
    near(attended, expected)
    scale = {"output_scale": random(HEADS * SIZE)}
    scaled = merge_function(MergeSplits(output_scale=True))
    (found,) = execute(scaled, {"partial": partial, "log_sum_exp": log_sum_exp, **scale})
    near(found, attention.attend(**tensors, **tensors_of(scale)))
    saw_nothing = (expected == 0).all(-1).numpy()
    assert saw_nothing.any() == blind
    assert np.array_equal(np.isneginf(log_sum_exp[:, 0]).all(1), saw_nothing)


def test_merge_weights_splits_and_ignores_those_without_attended_rows() -> None:
    parts, logs = random(BATCH, 4, HEADS, STEP, SIZE), random(BATCH, 4, HEADS, STEP)
    logs[:, 2] = logs[0, :, :, 1] = -np.inf
    parts[np.isneginf(logs)] = np.nan
    expected = attention.merge(torch.from_numpy(parts), torch.from_numpy(logs))
    near(execute(merge_function(MergeSplits()), {"partial": parts, "log_sum_exp": logs})[0], expected)
    scale = random(HEADS * SIZE)
    merging = merge_function(MergeSplits(output_scale=True))
    found = execute(merging, {"partial": parts, "log_sum_exp": logs, "output_scale": scale})[0]
    near(found, attention.merge(torch.from_numpy(parts), torch.from_numpy(logs), torch.from_numpy(scale)))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("residual", [False, True])
def test_int4_product(split: bool, rank: int, residual: bool) -> None:
    operator = Int4Product(split=split, adapter=rank > 0, residual=residual)
    node = operator.node(rows=6, inner=64, columns=10, group=16, rank=rank)
    inputs: dict[str, NDArray[np.generic]] = {name: random(*shape) for name, shape in node.shapes.items()}
    words = np.random.default_rng(0).integers(0, 2**32, node.shapes["packed"], np.uint32)
    inputs["packed"] = words.view(np.int32)
    given = {name: torch.from_numpy(array) for name, array in inputs.items() if name != "counters"}
    if split:
        inputs["counters"] = np.zeros(node.shapes["counters"], np.int32)
    y, *others = execute(int4_product_function(operator), inputs, {"counters_out": onnx.TensorProto.INT32})
    np.testing.assert_allclose(y, int4_product.int4_product(**given).numpy(), rtol=1e-4, atol=1e-3)
    if split:
        product = {name: given[name] for name in given.keys() & {"x", "packed", "scale"}}
        np.testing.assert_allclose(others[0][0], int4_product.int4_product(**product).numpy(), rtol=1e-4, atol=1e-3)
        assert not others[1].any()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_gated_int4_product(split: bool, normed: bool) -> None:
    operator = Int4Product(split=split, normed=normed, gated=True)
    node = operator.node(rows=6, inner=64, columns=48, group=16)
    inputs: dict[str, NDArray[np.generic]] = {name: random(*shape) / 4 for name, shape in node.shapes.items()}
    inputs["packed"] = np.random.default_rng(0).integers(0, 2**32, node.shapes["packed"], np.uint32).view(np.int32)
    if normed:
        inputs |= {"squares": np.abs(inputs["squares"]) * 64, "epsilon": np.array([0.1], np.float32)}
    given = {name: torch.from_numpy(array) for name, array in inputs.items() if name != "counters"}
    if split:
        inputs["counters"] = np.zeros(node.shapes["counters"], np.int32)
    y, *_ = execute(int4_product_function(operator), inputs, {"counters_out": onnx.TensorProto.INT32})
    np.testing.assert_allclose(y, int4_product.int4_product(**given, gated=True).numpy(), rtol=1e-4, atol=1e-3)


def test_what_a_norm_reads() -> None:
    """By the product before it and by the embedding."""
    operator = Int4Product(residual=True, for_norm=True)
    node = operator.node(rows=6, inner=64, columns=80, group=16)
    inputs: dict[str, NDArray[np.generic]] = {name: random(*shape) for name, shape in node.shapes.items()}
    inputs["packed"] = np.random.default_rng(0).integers(0, 2**32, node.shapes["packed"], np.uint32).view(np.int32)
    y, weighted, squares = execute(int4_product_function(operator), inputs)
    expected = norm_terms.norm_terms(torch.from_numpy(y), torch.from_numpy(inputs["next_weight"]))
    near(weighted, expected[0])
    np.testing.assert_allclose(squares.sum(0), expected[1].sum(0).numpy(), rtol=1e-5)
    given: dict[str, NDArray[np.generic]] = {
        "input_ids": np.array([[3, 0, 7], [1, 1, 2]]),
        "table": random(8, 80),
        "next_weight": random(80),
    }
    x, weighted, squares = execute(embed_function(Embed(for_norm=True)), given)
    wanted = embed.embed_for_norm(**tensors_of(given))
    near(x, wanted[0])
    near(weighted, wanted[1])
    np.testing.assert_allclose(squares.sum(0), wanted[2].sum(0).numpy(), rtol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_qkv_product(split: bool) -> None:
    operator = QkvProduct(split=split, normed=True)
    node = operator.qkv_node(
        batch=BATCH, step=STEP, capacity=CAPACITY, inner=64, kv_heads=KV_HEADS, group=GROUP, head_dim=SIZE,
        weight_group=16,
    )  # fmt: skip
    inputs: dict[str, NDArray[np.generic]] = {name: random(*shape) / 4 for name, shape in node.shapes.items()}
    inputs["packed"] = np.random.default_rng(0).integers(0, 2**32, node.shapes["packed"], np.uint32).view(np.int32)
    inputs["write_indices"] = COMMITTED
    inputs |= {"squares": np.abs(inputs["squares"]) * 64, "epsilon": np.array([0.1], np.float32)}
    given = {name: torch.from_numpy(array.copy()) for name, array in inputs.items() if name != "counters"}
    if split:
        inputs["counters"] = np.zeros(node.shapes["counters"], np.int32)
    function = qkv_product_function(operator, SIZE)
    outputs = execute(function, inputs, {"counters_out": onnx.TensorProto.INT32})
    found = dict(zip(function.output, outputs, strict=True))
    q = qkv_product.qkv_product(**given)
    for name, wanted in (("q", q), ("k_cache_out", given["k_cache"]), ("v_cache_out", given["v_cache"])):
        np.testing.assert_allclose(found[name], wanted.numpy(), rtol=1e-4, atol=1e-3)


def tensors_of(inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def test_embed_and_select_rows() -> None:
    inputs: dict[str, NDArray[np.generic]] = {"input_ids": np.array([[3, 0, 7], [1, 1, 2]]), "table": random(8, 11)}
    near(execute(embed_function(Embed()), inputs)[0], embed.embed(**tensors_of(inputs)))
    inputs = {"x": random(2, 5, 11), "logit_rows": np.array([[4, 0], [2, 2]])}
    near(execute(select_rows_function(), inputs)[0], select_rows.select_rows(**tensors_of(inputs)))


def test_rotations() -> None:
    """The last positions are past the last scale's."""
    inputs: dict[str, NDArray[np.generic]] = {
        "position_ids": np.array([[0, 1, LENGTH - 1], [LENGTH, 200_000, 262_143]]),
        "frequencies": np.abs(random(SIZE // 2)) / 3,
        "key_scale": np.array([1.3], np.float32),
        "query_scales": np.array([0.5, 2, 3], np.float32),
    }
    expected = rotations.rotations(**tensors_of(inputs), length=LENGTH, real=torch.float32)
    found = execute(rotations_function(LENGTH, onnx.TensorProto.FLOAT), inputs)
    for table, wanted in zip(found, expected, strict=True):
        near(table, wanted)
    narrow = dict.fromkeys(rotations_function(LENGTH, onnx.TensorProto.FLOAT).output, onnx.TensorProto.FLOAT16)
    found = execute(rotations_function(LENGTH, onnx.TensorProto.FLOAT16), inputs, narrow)
    for table, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(table, wanted.half().numpy(), rtol=2e-3, atol=1e-6)


def test_rms_norm() -> None:
    inputs: dict[str, NDArray[np.generic]] = {
        "x": random(BATCH, STEP, 24),
        "weight": random(24),
        "epsilon": np.array([0.1], np.float32),
    }
    near(execute(rms_norm_function(), inputs)[0], rms_norm.rms_norm(**tensors_of(inputs)))


def test_swiglu() -> None:
    inputs: dict[str, NDArray[np.generic]] = {"gate_up": random(BATCH, STEP, 24)}
    near(execute(swiglu_function(), inputs)[0], swiglu.swiglu(**tensors_of(inputs)))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("residual", [False, True])
def test_dense_product(scaled: bool, rank: int, residual: bool) -> None:
    inner, columns = 24, 10
    inputs: dict[str, NDArray[np.generic]] = {"x": random(BATCH, STEP, inner), "weight": random(inner, columns)}
    if scaled:
        inputs["row_scale"] = random(BATCH)
    if rank:
        inputs |= {"narrow": random(BATCH, STEP, rank), "adapter_up": random(rank, columns)}
    if residual:
        inputs["residual"] = random(BATCH, STEP, columns)
    operator = DenseProduct(row_scale=scaled, adapter=rank > 0, residual=residual)
    found = execute(dense_product_function(operator), inputs)[0]
    np.testing.assert_allclose(found, dense_product.dense_product(**tensors_of(inputs)).numpy(), rtol=1e-4, atol=1e-4)


def test_split_dense_product() -> None:
    operator = DenseProduct(split=True, row_scale=True)
    node = operator.node(batch=BATCH, step=STEP, inner=1024, columns=24)
    inputs: dict[str, NDArray[np.generic]] = {name: random(*shape) for name, shape in node.shapes.items()}
    given = {name: torch.from_numpy(array) for name, array in inputs.items() if name != "counters"}
    inputs["counters"] = np.zeros(node.shapes["counters"], np.int32)
    y, partial, counters = execute(dense_product_function(operator), inputs, {"counters_out": onnx.TensorProto.INT32})
    np.testing.assert_allclose(y, dense_product.dense_product(**given).numpy(), rtol=1e-4, atol=1e-3)
    unscaled = given["x"] @ given["weight"]
    np.testing.assert_allclose(partial[0], unscaled.flatten(0, 1).numpy(), rtol=1e-4, atol=1e-3)
    assert not counters.any()


@pytest.mark.parametrize("top_k", [1, TOP_K])
@pytest.mark.parametrize("vocabulary", [TILE - 20, 2 * TILE, 2 * TILE + 3])
@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if isinstance(operator, Head)])
def test_a_head_and_its_candidates(name: str, vocabulary: int, top_k: int) -> None:
    """With many equal logits; of the masked rows, one has no legal token."""
    operator = OPERATORS[name]
    assert isinstance(operator, Head)
    inputs, attributes = head_inputs(operator, torch.float32, 2, 3, vocabulary, top_k=top_k)
    if isinstance(operator, Int4Head):
        function = int4_head_function(operator, **attributes)
        expected = head_product.int4_head(**inputs, **attributes)
    else:
        function = dense_head_function(operator, **attributes)
        expected = head_product.dense_head(**inputs, **attributes)
    arrays: dict[str, NDArray[np.generic]] = {name: tensor.numpy() for name, tensor in inputs.items()}
    found = execute(function, arrays, {"tile_tokens": onnx.TensorProto.INT32})
    for array, wanted in zip(found, expected, strict=True):
        assert array.shape == wanted.shape
        near(array, wanted)
    tiles: dict[str, NDArray[np.generic]] = dict(zip(function.output, found[:4], strict=False))
    merged = execute(merge_candidates_function(top_k), tiles, {"top_tokens": onnx.TensorProto.INT64})
    for array, wanted in zip(merged, candidates.merge_candidates(*expected[:4], top_k=top_k), strict=True):
        near(array, wanted)
    assert (merged[2][1, 2] == np.float32(NEVER)) == operator.masked
