"""Every implementation of attention against the one definition, :mod:`trimode.model.attention`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import helper

from trimode.build.graph.network import NetworkOptions, build_network
from trimode.build.graph.onnx_builder import IR_VERSION, OPSET
from trimode.build.graph.operator_functions import PARSER_ATTRIBUTES, attend_function
from trimode.build.graph.raw_pool import write_raw_pool
from trimode.common.progress import no_progress
from trimode.model.attention import attend, attends
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.patterns import bidirectional, blocks_of_text, causal
from trimode.model.step import AttentionPattern, mask_words
from trimode.plugins.operators import DOMAIN, Attend, Pattern
from trimode.plugins.reference import attention

BATCH, STEP, HEADS, KV_HEADS, SIZE, CAPACITY = 3, 4, 6, 2, 8, 20
COMMITTED = np.array([0, 5, 15])
LENGTHS = np.array([4, 1, 3])
TREE = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], np.bool_)
# One mask a sequence: a tree, a mask whose second token attends to no row of the step, and padding.
MASKS = np.stack([TREE, np.where(np.arange(4)[:, None] == 1, False, TREE), np.eye(4, dtype=np.bool_)])
PATTERNS: list[Pattern] = ["causal", "bidirectional", "masked"]


def extra(pattern: Pattern) -> dict[str, NDArray[Any]]:
    return {"causal": {}, "bidirectional": {"step_lengths": LENGTHS}, "masked": {"block_mask": MASKS}}[pattern]


def of_sequence(pattern: Pattern, sequence: int) -> dict[str, Any]:
    """The definition's arguments for one sequence of the batch."""
    if pattern == "bidirectional":
        return {"step_length": int(LENGTHS[sequence])}
    return {"block_mask": MASKS[sequence]} if pattern == "masked" else {}


def tensors() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    cache = (BATCH, KV_HEADS, CAPACITY, SIZE)
    return {
        "q": rng.standard_normal((BATCH, HEADS, STEP, SIZE), np.float32),
        "k_cache": rng.standard_normal(cache, np.float32),
        "v_cache": rng.standard_normal(cache, np.float32),
    }


def defined(pattern: Pattern, inputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.stack(
        [
            attend(
                *(inputs[name][index] for name in ("q", "k_cache", "v_cache")),
                int(COMMITTED[index]),
                **of_sequence(pattern, index),
            )
            for index in range(BATCH)
        ]
    )


def defined_mask(pattern: Pattern, committed: NDArray[np.int64], step: int, rows: int) -> NDArray[np.bool_]:
    """Which rows each token attends to, [batch, step, rows]."""
    return np.array(
        [
            [
                [attends(token, row, int(start), step, **of_sequence(pattern, index)) for row in range(rows)]
                for token in range(step)
            ]
            for index, start in enumerate(committed)
        ]
    )


def test_the_definition_by_hand() -> None:
    """Two tokens after one committed row, with one head of one element: weights exp(q k)."""
    q, keys, values = (
        np.ones((1, 2, 1)),
        np.log([[[1.0], [2.0], [5.0], [7.0]]]),
        np.array([[[1.0], [10.0], [100.0], [0]]]),
    )
    assert attend(q, keys, values, 1)[0, :, 0] == pytest.approx([21 / 3, 521 / 8])
    assert attend(q, keys, values, 1, step_length=2)[0, :, 0] == pytest.approx([521 / 8, 521 / 8])
    mask = np.array([[True, False], [False, True]])
    assert attend(q, keys, values, 1, block_mask=mask)[0, :, 0] == pytest.approx([21 / 3, 501 / 6])
    assert attend(q, keys, values, 0, step_length=0)[0, :, 0].tolist() == [0, 0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_kernels_reference(pattern: Pattern) -> None:
    inputs = tensors()
    arguments = {name: torch.from_numpy(array) for name, array in (inputs | extra(pattern)).items()}
    found = attention.attend(**arguments, write_indices=torch.from_numpy(COMMITTED))
    expected = defined(pattern, inputs).transpose(0, 2, 1, 3).reshape(BATCH, STEP, -1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_onnx_functions(pattern: Pattern) -> None:
    inputs: dict[str, NDArray[Any]] = {**tensors(), "write_indices": COMMITTED, **extra(pattern)}
    function = attend_function(Attend(pattern))
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    node = helper.make_node(
        function.name, list(function.input), list(function.output), domain=DOMAIN, **PARSER_ATTRIBUTES, splits=1
    )
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in function.output]
    graph = helper.make_graph([node], "one", values, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[function])
    partial, _ = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)
    np.testing.assert_allclose(partial[:, 0], defined(pattern, tensors()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
@pytest.mark.parametrize("windowed", [False, True])
def test_the_graph_of_standard_operators(
    random_checkpoint: Path, tmp_path: Path, pattern: AttentionPattern, windowed: bool
) -> None:
    """The inputs and the result of the last layer's attention, in a pass of ONNX Runtime."""
    checkpoint = Checkpoint(random_checkpoint)
    config = checkpoint.config
    pool = write_raw_pool(checkpoint, tmp_path / "raw.bin", no_progress, np.dtype(np.float32))
    options = NetworkOptions(
        adapter=False, top_k=1, kv_read="window" if windowed else "cache", rotate_together=windowed
    )
    model = build_network(config, pool, pattern, options)
    node = [node for node in model.graph.node if node.op_type == "Attention"][-1]
    for name, kind in zip((*node.input, *node.output), "fffbf", strict=True):
        dtype = onnx.TensorProto.BOOL if kind == "b" else onnx.TensorProto.FLOAT
        model.graph.output.append(helper.make_tensor_value_info(name, dtype, None))
    onnx.save(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    cache = (BATCH, config.num_key_value_heads, CAPACITY, config.head_dim)
    inputs: dict[str, NDArray[Any]] = {
        "input_ids": rng.integers(101, config.vocab_size, (BATCH, STEP)),
        "position_ids": COMMITTED[:, None] + np.arange(STEP),
        "write_indices": COMMITTED,
        "logit_rows": np.zeros((BATCH, 1), np.int64),
        "token_mask": np.empty((BATCH, 0, 4 * mask_words(config.vocab_size)), np.uint8),
        "asked_ids": np.empty((BATCH, 1, 0), np.int64),
    }
    inputs |= {"block_mask": MASKS} if pattern == "causal" else {"step_lengths": LENGTHS}
    for value in session.get_inputs():
        if "_cache." in value.name:
            inputs[value.name] = rng.standard_normal(cache, np.float32)
    rows = CAPACITY
    if windowed:
        rows = int(COMMITTED.max()) + STEP
        inputs["window_rows"] = np.arange(rows)
    names = [*node.input, *node.output]
    q, keys, values, mask, found = session.run(names, inputs)
    semantics: Pattern = "masked" if pattern == "causal" else "bidirectional"
    group = config.num_attention_heads // config.num_key_value_heads
    assert keys.shape == (BATCH, config.num_key_value_heads, rows, config.head_dim)
    expected_mask = np.tile(defined_mask(semantics, COMMITTED, STEP, rows), (1, group, 1))
    np.testing.assert_array_equal(np.broadcast_to(mask[:, 0], expected_mask.shape), expected_mask)
    for index in range(BATCH):
        # Queries that share a KV head are rows of one matrix.
        queries = q[index].reshape(-1, STEP, config.head_dim)
        arguments = of_sequence(semantics, index)
        expected = attend(queries, keys[index], values[index], int(COMMITTED[index]), **arguments)
        np.testing.assert_allclose(found[index].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
def test_the_pytorch_reference(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, pattern: AttentionPattern
) -> None:
    """The attention of both layers in a step of two sequences after a prefix."""
    model, past = load_reference(Checkpoint(random_checkpoint)), 5
    calls: list[tuple[NDArray[Any], ...]] = []
    compute = F.scaled_dot_product_attention

    def listening(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        result = compute(q, k, v, attn_mask=attn_mask)
        calls.append(tuple(tensor.double().numpy() for tensor in (q, k, v, attn_mask, result)))
        return result

    ids = torch.from_numpy(np.random.default_rng(0).integers(101, 700, (2, past + STEP)))
    positions = torch.arange(past + STEP).expand(2, -1)
    with torch.no_grad():
        _, cache = model.encoder(ids[:, :past], positions[:, :past], causal(2, past, 0))
        monkeypatch.setattr(F, "scaled_dot_product_attention", listening)
        visible = (causal if pattern == "causal" else bidirectional)(2, STEP, past)
        model.encoder(ids[:, past:], positions[:, past:], visible, cache)
    assert len(calls) == model.config.num_hidden_layers
    arguments: dict[str, Any] = {} if pattern == "causal" else {"step_length": STEP}
    for q, keys, values, mask, found in calls:
        assert mask.shape == (2, 1, STEP, past + STEP)
        for index in range(2):
            queries = q[index] * q.shape[-1] ** -0.5
            np.testing.assert_allclose(
                found[index], attend(queries, keys[index], values[index], past, **arguments), atol=1e-5
            )


def test_the_blocks_of_a_calibration_text() -> None:
    """The text's rows from the block's start on are not attended to: the block's own rows take their place."""
    starts, step, past = [1, 4, 5], 3, 8
    found = blocks_of_text(torch.tensor(starts), step, past).numpy()
    for block, start in enumerate(starts):
        expected = [
            [attends(token, row, start, step, step_length=step) for row in range(start + step)] for token in range(step)
        ]
        rows = [*range(start), *range(past, past + step)]
        np.testing.assert_array_equal(found[block][:, rows], expected)
        assert not found[block][:, start:past].any()
