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

from trimode.build.graph.onnx_builder import IR_VERSION, OPSET
from trimode.build.graph.operator_functions import (
    PARSER_ATTRIBUTES,
    attend_function,
    int4_product_function,
    kv_write_function,
    merge_function,
)
from trimode.plugins.operators import DOMAIN, Int4Product, Pattern
from trimode.plugins.reference import attention, int4_product, kv_write

BATCH, STEP, KV_HEADS, GROUP, SIZE, CAPACITY = 3, 5, 2, 3, 16, 24
HEADS = KV_HEADS * GROUP
COMMITTED = np.array([0, 7, 19])


def execute(function: onnx.FunctionProto, inputs: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    """One node of the function; its inputs are the graph's."""
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    attributes = {
        name: value
        for name, value in {**PARSER_ATTRIBUTES, "splits": 4, "group": GROUP}.items()
        if name in function.attribute
    }
    node = helper.make_node(function.name, list(function.input), list(function.output), domain=DOMAIN, **attributes)
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in function.output]
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
    partial, log_sum_exp = execute(attend_function(pattern), {**inputs, **extra})
    (attended,) = execute(merge_function(), {"partial": partial, "log_sum_exp": log_sum_exp})
    expected = attention.attend(**tensors)
    near(attended, expected)
    saw_nothing = (expected == 0).all(-1).numpy()
    assert saw_nothing.any() == blind
    assert np.array_equal(np.isneginf(log_sum_exp[:, 0]).all(1), saw_nothing)


def test_merge_weights_splits_and_ignores_those_without_attended_rows() -> None:
    parts, logs = random(BATCH, 4, HEADS, STEP, SIZE), random(BATCH, 4, HEADS, STEP)
    logs[:, 2] = logs[0, :, :, 1] = -np.inf
    parts[np.isneginf(logs)] = np.nan
    expected = attention.merge(torch.from_numpy(parts), torch.from_numpy(logs))
    near(execute(merge_function(), {"partial": parts, "log_sum_exp": logs})[0], expected)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("residual", [False, True])
def test_int4_product(scaled: bool, rank: int, residual: bool) -> None:
    inner, columns, group, rows = 64, 10, 16, 6
    operator = Int4Product(input_scale=scaled, adapter=rank > 0, residual=residual)
    everything = np.arange(inner * columns // 2).reshape(inner, columns // 2) % 256  # every byte value
    inputs: dict[str, NDArray[np.generic]] = {
        "x": random(rows, inner),
        "packed": everything.astype(np.uint8).view(np.int8),
        "scale": random(inner // group, columns),
    }
    if scaled:
        inputs["input_scale"] = random(inner)
    if rank:
        inputs |= {"narrow": random(rows, rank), "adapter_up": random(rank, columns)}
    if residual:
        inputs["residual"] = random(rows, columns)
    expected = int4_product.int4_product(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    found = execute(int4_product_function(operator), inputs)[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-3)
