"""Target tensorrt without a GPU: what is emitted, that its graphs decode as target cpu does, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.build.graph_executor import GraphExecutor
from trimode.build.engine import TensorrtOptions, build_engine
from trimode.build.network import NetworkOptions, PluginOptions
from trimode.build.tensorrt_graphs import SPLITS, write_graphs
from trimode.model.checkpoint import Checkpoint
from trimode.model.manifest import ADAPTER, POOL, Manifest
from trimode.model.progress import no_progress
from trimode.quantize import quantize_checkpoint
from trimode.runtime.decoding import DecodingOptions, Mode
from trimode.runtime.engine import Engine

ROWS = 512


@pytest.fixture(scope="module")
def tiny_int4(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "int4"
    quantize_checkpoint(Checkpoint(tiny_checkpoint), out, method="rtn", group=64)
    return out


@pytest.fixture(scope="module")
def cpu_engine(tiny_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "cpu"
    build_engine(Checkpoint(tiny_int4), out)
    return out


@pytest.fixture(scope="module")
def emitted(tiny_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "tensorrt"
    options = TensorrtOptions(sms=(90,), dtype="fp16", max_batch=4, max_step=256, emit_only=True)
    build_engine(Checkpoint(tiny_int4), out, target=options)
    return out


def decode_by_graphs(engine: Engine, graphs: GraphExecutor, prompt: list[int], options: DecodingOptions) -> list[int]:
    kept = engine.executor
    engine.executor = graphs  # type: ignore[assignment]
    try:
        return engine.generate(prompt, options).token_ids
    finally:
        engine.executor = kept


def test_greedy_decoding_through_the_functions_gives_target_cpus_tokens(
    tiny_int4: Path, cpu_engine: Path, heldout: list[dict], tmp_path: Path
) -> None:
    """The target's own graphs in fp32, every mode: prefills of more than one chunk, drafts, commits, the adapter."""
    checkpoint, engine = Checkpoint(tiny_int4), Engine(cpu_engine)
    assert checkpoint.adapter is not None
    plugins = PluginOptions(SPLITS, checkpoint.adapter.config.r)
    options = NetworkOptions(top_k=64, adapter=True, capacity=ROWS, plugins=plugins)
    pool = write_graphs(checkpoint, tmp_path, options, (), no_progress)
    graphs = GraphExecutor(tmp_path, pool, tmp_path / POOL, cpu_engine / ADAPTER, checkpoint.config, ROWS, np.float32)
    modes: tuple[Mode, ...] = ("ar", "diffusion", "linear_spec")
    for record in heldout[::60]:
        prompt = engine.tokenizer.encode(engine.tokenizer.apply_chat_template(record["messages"]))
        for mode in modes:
            decoding = DecodingOptions(mode=mode, block_length=16, max_tokens=48)
            expected = engine.generate(prompt, decoding).token_ids
            assert decode_by_graphs(engine, graphs, prompt, decoding) == expected


def test_the_emitted_16_bit_graphs_decode_too(emitted: Path, cpu_engine: Path, heldout: list[dict]) -> None:
    """The very files that TensorRT is given. In fp16 a near-tie may fall otherwise, so most tokens are asked for."""
    manifest, engine = Manifest.read(emitted), Engine(cpu_engine)
    graphs = GraphExecutor(
        emitted,
        manifest.pool,
        emitted / POOL,
        emitted / ADAPTER,
        manifest.model,
        manifest.limits.capacity,
        np.float16,
    )
    same = 0
    records = heldout[5::70]
    for record in records:
        prompt = engine.tokenizer.encode(engine.tokenizer.apply_chat_template(record["messages"]))
        decoding = DecodingOptions(mode="linear_spec", block_length=16, max_tokens=48)
        same += decode_by_graphs(engine, graphs, prompt, decoding) == engine.generate(prompt, decoding).token_ids
    assert same >= len(records) - 1
