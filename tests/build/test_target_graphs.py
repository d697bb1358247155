"""The forms that GPU targets give the graph (a window of the KV pool and folded queries; the plugins' operators with
weights as inputs) compute what the plain form does: the same logits, and the same rows in the same places of the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from tests.build.graph_executor import bind_pooled, open_session
from trimode.build import network
from trimode.build.network import NetworkOptions, PluginOptions, build_network
from trimode.build.raw_pool import RawPool, write_raw_pool
from trimode.model.checkpoint import Checkpoint
from trimode.model.progress import no_progress
from trimode.model.step import AttentionPattern, cache_inputs, cache_outputs

CAPACITY, COMMITTED, WINDOW, STEP, BATCH = 256, (40, 93), 128, 12, 2


@pytest.fixture(scope="module")
def checkpoint(random_int4_checkpoint: Path) -> Checkpoint:
    return Checkpoint(random_int4_checkpoint)


@pytest.fixture(scope="module")
def pool(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> RawPool:
    path = tmp_path_factory.mktemp("pool") / "raw.bin"
    return write_raw_pool(checkpoint, path, no_progress, np.dtype(np.float32))


def execute(
    checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern, options: NetworkOptions
) -> dict[str, NDArray[np.generic]]:
    """One pass over a pool of random rows, in ONNX Runtime."""
    rng, config = np.random.default_rng(0), checkpoint.config
    source = pool.path.with_name(f"{pattern}.onnx")
    onnx.save(build_network(config, pool, pattern, options), source)
    onnx.checker.check_model(source)
    write = np.array(COMMITTED)
    feeds: dict[str, NDArray[np.generic]] = {
        "input_ids": rng.integers(101, 768, (BATCH, STEP)),
        "position_ids": write[:, None] + np.arange(STEP),
        "write_indices": write,
        "logit_rows": np.tile(np.arange(STEP), (BATCH, 1)),
        "block_mask": np.tril(rng.random((BATCH, STEP, STEP)) < 0.7) | np.eye(STEP, dtype=bool),
        "step_lengths": np.array([STEP, STEP - 5]),
        "adapter_scale": np.array([1, 0], np.float32),
        "window_rows": np.arange(WINDOW),
    }
    cache = (BATCH, config.num_key_value_heads, CAPACITY, config.head_dim)
    for name in cache_inputs(config.num_hidden_layers):
        feeds[name] = rng.standard_normal(cache, np.float32)
    for index in range(config.num_hidden_layers):
        feeds[f"adapter_down.{index}"] = rng.standard_normal((config.query_width, 8), np.float32) * np.float32(0.1)
        feeds[f"adapter_up.{index}"] = rng.standard_normal((8, config.hidden_size), np.float32) * np.float32(0.1)
    session = open_session(source)
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


@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("window", [False, True])
def test_every_form_computes_the_same(
    checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern, fold: bool, window: bool
) -> None:
    form = NetworkOptions(top_k=768, adapter=True, capacity=CAPACITY, window=window, fold_queries=fold)
    compare(checkpoint, pool, pattern, form)


@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
def test_the_plugins_functions_compute_the_same(
    checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern
) -> None:
    plugins = PluginOptions(splits=16, rank=8)
    compare(checkpoint, pool, pattern, NetworkOptions(top_k=768, adapter=True, capacity=CAPACITY, plugins=plugins))


def compare(checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern, form: NetworkOptions) -> None:
    plain = NetworkOptions(top_k=768, adapter=True)
    expected = execute(checkpoint, pool, pattern, plain)
    found = execute(checkpoint, pool, pattern, form)
    assert found.keys() == expected.keys() >= set(cache_outputs(checkpoint.config.num_hidden_layers))
    real = slice(0, STEP - 5)  # all of these are tokens of both sequences
    for name, array in expected.items():
        if name in ("top_tokens", "top_logits"):
            continue
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-4, err_msg=name)
    np.testing.assert_array_equal(found["top_tokens"][:, real, 0], expected["top_tokens"][:, real, 0])


def test_a_window_that_ends_too_early_is_seen(
    checkpoint: Checkpoint, pool: RawPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard above can fail: rows past the window are not attended to."""
    monkeypatch.setattr(f"{__name__}.WINDOW", 64)
    plain = execute(checkpoint, pool, "causal", NetworkOptions(top_k=4, adapter=False))
    form = NetworkOptions(top_k=4, adapter=False, capacity=CAPACITY, window=True, fold_queries=True)
    differing = np.abs(execute(checkpoint, pool, "causal", form)["log_sum_exp"] - plain["log_sum_exp"])
    assert differing[0].max() < 1e-3 < differing[1].max()


def less_or_equal(function: onnx.FunctionProto) -> None:
    """Each token sees one row more."""
    for node in function.node:
        node.op_type = {"Less": "LessOrEqual"}.get(node.op_type, node.op_type)


def odd_first(function: onnx.FunctionProto) -> None:
    """The high nibble as the even column."""
    for node in function.node:
        if node.op_type == "Concat" and node.attribute[0].i == 2:
            node.input[:] = node.input[::-1]


def rotated_alike(function: onnx.FunctionProto) -> None:
    """Queries without their scale."""
    for node in function.node:
        node.input[:] = [name.replace("query_", "key_") for name in node.input]


def without_adapter(function: onnx.FunctionProto) -> None:
    """Zeros in the place of the adapter's first half."""
    for node in function.node:
        if list(node.input) == ["narrow"]:
            node.CopyFrom(onnx.helper.make_node("Sub", ["narrow", "narrow"], node.output))


@pytest.mark.parametrize(
    ("made", "spoil", "pattern"),
    [
        ("attend_function", less_or_equal, "causal"),
        ("attend_function", less_or_equal, "bidirectional"),
        ("int4_product_function", odd_first, "causal"),
        ("int4_product_function", without_adapter, "bidirectional"),
        ("kv_write_function", rotated_alike, "causal"),
    ],
)
def test_a_fault_in_a_function_is_seen(
    checkpoint: Checkpoint,
    pool: RawPool,
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
        test_the_plugins_functions_compute_the_same(checkpoint, pool, pattern)
    assert any(changed)
