"""Graphs with plugin nodes and weights as inputs compute the same as graphs of standard operators. ONNX Runtime runs
the operators' functions. Faults planted in the functions are detected.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from tests.build.graph.test_target_graphs import (
    CAPACITY,
    PATTERNS,
    Arrays,
    assert_same,
    graph_of,
    inputs_of,
)
from tests.support.graph_executor import bind_pooled, open_session
from trimode.build.graph import operator_network
from trimode.build.graph.network import NetworkOptions
from trimode.build.graph.operator_network import OperatorNetworkOptions, build_operator_network
from trimode.build.graph.raw_pool import RawPool, write_raw_pool
from trimode.common.progress import no_progress
from trimode.model.checkpoint import Checkpoint, DenseWeight, Int4Weight, linear_shapes
from trimode.model.step import AttentionPattern


@pytest.fixture(scope="module")
def checkpoint(random_int4_checkpoint: Path) -> Checkpoint:
    return Checkpoint(random_int4_checkpoint)


@pytest.fixture(scope="module")
def pool(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> RawPool:
    """As graphs of standard operators read it."""
    path = tmp_path_factory.mktemp("pool") / "raw.bin"
    return write_raw_pool(checkpoint, path, no_progress, np.dtype(np.float32))


@pytest.fixture(scope="module")
def tiles(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> RawPool:
    """As the plugins read it."""
    path = tmp_path_factory.mktemp("tiles") / "raw.bin"
    return write_raw_pool(checkpoint, path, no_progress, np.dtype(np.float32), "kernels")


def plain_graph(checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern) -> onnx.ModelProto:
    return graph_of(checkpoint, pool, pattern, NetworkOptions(top_k=768, adapter=True, masks="apart"))


def plugin_graph(checkpoint: Checkpoint, tiles: RawPool, pattern: AttentionPattern) -> onnx.ModelProto:
    options = OperatorNetworkOptions(
        "fp32",
        top_k=768,
        splits=16,
        rank=8,
        standard_results=True,
        standard_products=True,
        capacity=CAPACITY,
    )
    graph = build_operator_network(checkpoint.config, tiles, pattern, options)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def execute(checkpoint: Checkpoint, pool: RawPool, graph: onnx.ModelProto, changed: Arrays | None = None) -> Arrays:
    """One pass over a pool of random rows in ONNX Runtime. Weights that are inputs are bound to their pool ranges.
    changed: inputs that differ from the usual ones.
    """
    onnx.save(graph, source := pool.path.with_name("executed.onnx"))
    session, feeds = open_session(source), inputs_of(checkpoint) | (changed or {})
    binding = session.io_binding()
    data = np.memmap(pool.path, np.uint8, mode="r")
    pooled = {entry.name: data[entry.offset : entry.offset + entry.length] for entry in pool.ranges()}
    for value in session.get_inputs():
        if value.name in pooled:
            bind_pooled(binding, value, pooled[value.name])
        else:
            binding.bind_cpu_input(value.name, feeds[value.name])
    names = [value.name for value in session.get_outputs()]
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))


@PATTERNS
def test_the_plugins_functions_compute_the_same(
    checkpoint: Checkpoint, pool: RawPool, tiles: RawPool, pattern: AttentionPattern
) -> None:
    found = execute(checkpoint, tiles, plugin_graph(checkpoint, tiles, pattern))
    assert_same(found, execute(checkpoint, pool, plain_graph(checkpoint, pool, pattern)))


@PATTERNS
@pytest.mark.parametrize("dense_up", [False, True], ids=["int4", "16-bit gate and up"])
def test_input_scales_are_applied_wherever_the_pool_has_them(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: AttentionPattern, dense_up: bool
) -> None:
    """AWQ's. In the pool for kernels, norms and up include those of what reads them. Attention multiplies its output by
    that of o, and the adapter is divided by it.
    """

    linear, dense = Checkpoint.linear, ("gate_proj", "up_proj") if dense_up else ()

    def drawn(_checkpoint: Checkpoint, module: str) -> NDArray[np.float32] | None:
        if module.endswith(dense):
            return None
        read = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
        shapes = linear_shapes(checkpoint.config)
        seed = read.get(module.rpartition(".")[2], 4)
        return np.random.default_rng(seed).uniform(0.5, 2, shapes[module][1]).astype(np.float32)

    def mixed(opened: Checkpoint, module: str) -> DenseWeight | Int4Weight:
        weight = linear(opened, module)
        return DenseWeight(weight.to_float32()) if module.endswith(dense) else weight

    monkeypatch.setattr(Checkpoint, "input_scale", drawn)
    monkeypatch.setattr(Checkpoint, "linear", mixed)
    real = np.dtype(np.float32)
    plain = write_raw_pool(checkpoint, tmp_path / "plain.bin", no_progress, real)
    tiles = write_raw_pool(checkpoint, tmp_path / "tiles.bin", no_progress, real, "kernels")
    assert all(matrix.input_scale is not None for matrix in plain.linears() if matrix.scale is not None)
    kept = [matrix.weight.name for matrix in tiles.linears() if matrix.input_scale is not None]
    assert kept == [f"encoder.layers.{layer}.self_attn.o_proj" for layer in range(checkpoint.config.num_hidden_layers)]
    divided = inputs_of(checkpoint)
    for layer in range(checkpoint.config.num_hidden_layers):
        scale = drawn(checkpoint, f"encoder.layers.{layer}.self_attn.o_proj")
        assert scale is not None
        divided[f"adapter_down.{layer}"] = divided[f"adapter_down.{layer}"] / scale[:, None]
    found = execute(checkpoint, tiles, plugin_graph(checkpoint, tiles, pattern), divided)
    assert_same(found, execute(checkpoint, plain, plain_graph(checkpoint, plain, pattern)))


def less_or_equal(function: onnx.FunctionProto) -> None:
    """Each token attends to one more row."""
    for node in function.node:
        node.op_type = {"Less": "LessOrEqual"}.get(node.op_type, node.op_type)


def words_first(function: onnx.FunctionProto) -> None:
    """Nibble j of word w as row 8 w + j."""
    for node in function.node:
        if node.op_type == "Transpose" and len(node.attribute[0].ints) == 5:
            node.attribute[0].ints[:] = [1, 3, 4, 0, 2]


def without_query_scale(function: onnx.FunctionProto) -> None:
    """Queries without their scale."""
    for node in function.node:
        node.input[:] = [name.replace("query_", "key_") for name in node.input]


def without_adapter(function: onnx.FunctionProto) -> None:
    """Zeros in place of the adapter's first product."""
    for node in function.node:
        if list(node.input) == ["narrow"]:
            node.CopyFrom(onnx.helper.make_node("Sub", ["narrow", "narrow"], node.output))


@pytest.mark.parametrize(
    ("made", "spoil", "pattern"),
    [
        ("attend_function", less_or_equal, "causal"),
        ("attend_function", less_or_equal, "bidirectional"),
        ("int4_product_function", words_first, "causal"),
        ("int4_product_function", without_adapter, "bidirectional"),
        ("qkv_product_function", without_query_scale, "causal"),
    ],
)
def test_a_fault_in_a_function_is_detected(
    checkpoint: Checkpoint,
    pool: RawPool,
    tiles: RawPool,
    monkeypatch: pytest.MonkeyPatch,
    made: str,
    spoil: Callable[[onnx.FunctionProto], None],
    pattern: AttentionPattern,
) -> None:
    right, changed = getattr(operator_network, made), []

    def spoilt(*arguments: Any, **named: Any) -> onnx.FunctionProto:
        function = right(*arguments, **named)
        before = function.SerializeToString()
        spoil(function)
        changed.append(function.SerializeToString() != before)
        return function

    monkeypatch.setattr(operator_network, made, spoilt)
    with pytest.raises(AssertionError, match=r"log_sum_exp|_cache_out"):
        test_the_plugins_functions_compute_the_same(checkpoint, pool, tiles, pattern)
    assert any(changed)
