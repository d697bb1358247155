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

from tests.build.graph.test_target_graphs import CAPACITY, PATTERNS, Arrays, assert_same, graph_of, inputs_of
from tests.support.graph_executor import bind_pooled, open_session
from trimode.build.graph import network, split_products
from trimode.build.graph.network import NetworkOptions, PluginOptions
from trimode.build.graph.raw_pool import RawPool, write_raw_pool
from trimode.common.progress import no_progress
from trimode.model.checkpoint import Checkpoint
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
    return write_raw_pool(checkpoint, path, no_progress, np.dtype(np.float32), "tiles")


def execute(checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern, options: NetworkOptions) -> Arrays:
    """One pass over a pool of random rows in ONNX Runtime. Weights that are inputs are bound to their pool ranges."""
    onnx.save(graph_of(checkpoint, pool, pattern, options), source := pool.path.with_name(f"{pattern}.onnx"))
    session, feeds = open_session(source), inputs_of(checkpoint)
    binding = session.io_binding()
    data = np.memmap(pool.path, np.uint8, mode="r")
    pooled = {entry.name: data[entry.offset : entry.offset + entry.length] for entry in pool.ranges()}
    for value in session.get_inputs():
        if value.name in pooled:
            bind_pooled(binding, value, pooled[value.name])
        else:
            counters = np.zeros(value.shape, np.int32) if value.name == "counters" else None
            binding.bind_cpu_input(value.name, feeds[value.name] if counters is None else counters)
    names = [value.name for value in session.get_outputs()]
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))


@PATTERNS
def test_the_plugins_functions_compute_the_same(
    checkpoint: Checkpoint, pool: RawPool, tiles: RawPool, pattern: AttentionPattern
) -> None:
    plain = NetworkOptions(top_k=768, adapter=True)
    plugins = NetworkOptions(top_k=768, adapter=True, capacity=CAPACITY, plugins=PluginOptions(splits=16, rank=8))
    assert_same(execute(checkpoint, tiles, pattern, plugins), execute(checkpoint, pool, pattern, plain))


@PATTERNS
def test_split_products_pass_the_counters_on(
    checkpoint: Checkpoint,
    pool: RawPool,
    tiles: RawPool,
    pattern: AttentionPattern,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The small model's matrices are too short for splits, so pretend that they are not."""
    monkeypatch.setattr(split_products, "split_count", lambda *_: 2)
    plugins = NetworkOptions(top_k=768, adapter=True, capacity=CAPACITY, plugins=PluginOptions(splits=16, rank=8))
    found = execute(checkpoint, tiles, pattern, plugins)
    assert not found.pop("counters_out").any()
    assert_same(found, execute(checkpoint, pool, pattern, NetworkOptions(top_k=768, adapter=True)))
    products = [node for node in graph_of(checkpoint, tiles, pattern, plugins).graph.node if "Split" in node.op_type]
    chain = [(node.input[-1], node.output[-1]) for node in products if node.op_type.startswith("Int4ProductSplit")]
    assert len(chain) > checkpoint.config.num_hidden_layers
    assert [before for before, _ in chain] == ["counters", *(after for _, after in chain[:-1])]
    assert chain[-1][1] == "counters_out"


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
        ("kv_write_function", without_query_scale, "causal"),
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
    right, changed = getattr(network, made), []

    def spoilt(*arguments: Any) -> onnx.FunctionProto:
        function = right(*arguments)
        before = function.SerializeToString()
        spoil(function)
        changed.append(function.SerializeToString() != before)
        return function

    monkeypatch.setattr(network, made, spoilt)
    with pytest.raises(AssertionError, match=r"log_sum_exp|_cache_out"):
        test_the_plugins_functions_compute_the_same(checkpoint, pool, tiles, pattern)
    assert any(changed)
