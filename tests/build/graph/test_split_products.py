"""Split int4 products in the graph of our own kernels: the chain of counters, and a pass planned from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from trimode.build.graph import split_products
from trimode.build.graph.lowering import launch_list
from trimode.build.graph.operator_network import OperatorNetworkOptions, build_operator_network
from trimode.build.graph.raw_pool import write_raw_pool
from trimode.common.progress import no_progress
from trimode.model.checkpoint import Checkpoint
from trimode.model.step import ENGINES, AttentionPattern
from trimode.plugins.launches import PassShape, plan_pass
from trimode.plugins.operators import Int4Product


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("pattern", [pattern for _, pattern in ENGINES])
def test_every_split_product_passes_the_counters_on(
    random_int4_checkpoint: Path,
    tmp_path: Path,
    pattern: AttentionPattern,
    split: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The small model's matrices are too short for splits, so pretend that they are not."""
    monkeypatch.setattr(split_products, "split_count", lambda *_: 2 if split else 1)
    checkpoint = Checkpoint(random_int4_checkpoint)
    pool = write_raw_pool(checkpoint, tmp_path / "pool", no_progress, np.dtype(np.float32), "kernels")
    options = OperatorNetworkOptions("fp32", top_k=4, splits=4, rank=8)
    graph = build_operator_network(checkpoint.config, pool, pattern, options)
    onnx.checker.check_model(graph)
    launches = launch_list(graph, onnx.TensorProto.FLOAT, {entry.name for entry in pool.ranges()})
    planned = plan_pass(launches, PassShape(1, 5, 5, 64, 4, masked=False, asked=0))
    products = [launch for launch in planned if isinstance(launch.operator, Int4Product)]
    assert len(products) == 4 * checkpoint.config.num_hidden_layers + 1
    chain = ["counters"]
    for launch in planned:
        if "counters" in launch.node.shapes:
            assert launch.inputs[-1] == chain[-1]
            chain.append(launch.outputs[-1])
            (size,) = launch.node.shapes["counters"]
            assert launch.shapes[-1] == (size,)
            assert size >= Int4Product.counters(launch.node.shapes["scale"][1])
    assert ("counters" in {tensor.name for tensor in launches.inputs}) == split
    assert chain[-1] == ("counters_out" if split else "counters")
    assert len(set(chain)) == len(chain)
    assert len(chain) - 1 == (4 * checkpoint.config.num_hidden_layers if split else 0)  # the head is not split
