"""What a build for target cuda writes: graphs of our own operators, launch lists, the pool and the kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.graph_executor import GraphExecutor
from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.cpu.target import CpuTarget
from trimode.build.cuda.emission import write_launches
from trimode.build.cuda.target import CudaTarget
from trimode.build.engine_builder import build_engine
from trimode.build.gpu.kernel_network import write_pool_and_kernels
from trimode.build.graph import split_products
from trimode.build.graph.lowering import launch_list
from trimode.common.errors import TriModeError
from trimode.common.progress import no_progress
from trimode.engine.files import ADAPTER, POOL, verify_files
from trimode.engine.kernel_library import KERNELS, KernelLibrary
from trimode.engine.launch_list import LAUNCHES, LaunchList
from trimode.engine.manifest import Limits, Manifest
from trimode.engine.targets.cuda import GRAPH, CudaSection
from trimode.model.checkpoint import Checkpoint
from trimode.model.step import ENGINES
from trimode.plugins.launches import PassShape, plan_pass
from trimode.plugins.operators import DOMAIN
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep
from trimode.runtime.loading import load_engine

CAPACITY, TOP_K = 64, 4


@pytest.fixture(scope="module")
def engine(random_int4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        UncompiledKernels(patch)
        build_engine(
            Checkpoint(random_int4_checkpoint),
            out,
            target=CudaTarget(sms=(80, 90), dtype="fp16", max_batch=4, max_step=16),
            capacity=CAPACITY,
            top_k=TOP_K,
        )
    return out


def test_the_directory_is_complete(engine: Path) -> None:
    manifest = Manifest.read(engine)
    verify_files(engine, manifest.files)
    assert manifest.section(CudaSection).sms == (80, 90)
    assert manifest.precision.kv_cache == "fp16"
    assert {f"{name}/{file}" for name, _ in ENGINES for file in (LAUNCHES, GRAPH)} <= {
        entry.path for entry in manifest.files
    }


@pytest.mark.parametrize("name", [name for name, _ in ENGINES])
def test_every_node_is_a_launch_in_the_order_of_the_graph(engine: Path, name: str) -> None:
    """The head is two launches, of which a pass makes one."""
    graph, launches = onnx.load(engine / name / GRAPH).graph, LaunchList.read(engine / name)
    assert {node.domain for node in graph.node} == {DOMAIN}
    made = [launch for launch in launches.launches if launch.when != "unmasked"]
    assert [(launch.operator, launch.inputs, launch.outputs) for launch in made] == [
        (node.op_type, tuple(node.input), tuple(node.output)) for node in graph.node
    ]
    unmasked = [launch for launch in launches.launches if launch.when == "unmasked"]
    assert [launch.operator for launch in unmasked] == ["Int4HeadNormed"]
    assert set(unmasked[0].outputs) in [set(launch.outputs) for launch in made]
    assert [tensor.name for tensor in launches.weights] == [
        value.name for value in graph.input if value.name in {entry.name for entry in Manifest.read(engine).pool}
    ]


@pytest.mark.parametrize(("name", "count"), [("ar", 6), ("diffusion", 7)])
def test_the_launches_of_a_layer(engine: Path, name: str, count: int) -> None:
    """With int4 weights. The last layer selects the rows with logits in two launches more."""
    launches = LaunchList.read(engine / name).launches
    layers = Manifest.read(engine).model.num_hidden_layers
    counts = [sum(launch.outputs[0].startswith(f"layers.{layer}/") for launch in launches) for layer in range(layers)]
    assert counts == [*[count] * (layers - 1), count + 2]


def test_a_standard_operator_is_refused(engine: Path) -> None:
    graph = onnx.load(engine / "ar" / GRAPH)
    graph.graph.node.append(onnx.helper.make_node("Add", ["a", "b"], ["c"], name="layers.0/Add_1"))
    with pytest.raises(ValueError, match=r"layers\.0/Add_1 is a node of operator Add, which has no kernel"):
        launch_list(graph, onnx.TensorProto.FLOAT16, set())


def test_a_launch_list_is_read_as_it_was_written_and_other_versions_are_refused(engine: Path, tmp_path: Path) -> None:
    launches = LaunchList.read(engine / "ar")
    launches.write(tmp_path)
    assert LaunchList.read(tmp_path) == launches
    text = (tmp_path / LAUNCHES).read_text()
    (tmp_path / LAUNCHES).write_text(text.replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(TriModeError, match=r"launches\.json: format_version"):
        LaunchList.read(tmp_path)
    (tmp_path / LAUNCHES).unlink()
    with pytest.raises(TriModeError, match=r"launches\.json"):
        LaunchList.read(tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    step=st.integers(1, 16),
    one_row=st.booleans(),
    top_k=st.sampled_from([1, TOP_K]),
    masked=st.booleans(),
    asked=st.integers(0, 8),
)
def test_the_kernels_of_every_pass_are_in_the_library(
    engine: Path, batch: int, step: int, one_row: bool, top_k: int, masked: bool, asked: int
) -> None:
    shape = PassShape(batch, step, 1 if one_row else step, CAPACITY, top_k, masked, asked)
    library = KernelLibrary(engine / KERNELS, 90)
    for name, _ in ENGINES:
        launches = LaunchList.read(engine / name)
        planned = plan_pass(launches, shape)
        for operator, node, *_ in planned:
            names = {number: operator.kernel_name(node, number) for number in operator.tactics(node)}
            assert library.available(names) == list(names)
        results = {name: sizes for launch in planned for name, sizes in zip(launch.outputs, launch.shapes, strict=True)}
        assert results["top_tokens"] == (batch, shape.rows, top_k)
        assert results["log_sum_exp"] == (batch, shape.rows)
        assert results["asked_logits"] == (batch, shape.rows, asked)
        assert results["head/logits"] == (batch, shape.rows, 0 if top_k == 1 else 768)
        assert [launch.operator.name for launch in planned[-2:]] == [
            "Int4HeadNormedMasked" if masked else "Int4HeadNormed",
            "MergeCandidates",
        ]


@pytest.mark.parametrize("split", [False, True])
def test_the_graphs_executed_through_their_functions_equal_target_cpu(
    random_int4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: bool
) -> None:
    """A prompt, a draft with the adapter, and its verification, in fp32. split: products that are too short for it."""
    monkeypatch.setattr(split_products, "split_count", lambda *_: 2 if split else 1)
    checkpoint = Checkpoint(random_int4_checkpoint)
    cpu = CpuTarget(activations="fp32")
    build_engine(checkpoint, tmp_path / "cpu", target=cpu, capacity=CAPACITY, top_k=TOP_K)
    executor = load_engine(tmp_path / "cpu", verify=False).executor
    executor.pool.acquire()
    (tmp_path / "cuda").mkdir()
    limits = Limits(capacity=CAPACITY, prefill_step=16, top_k=TOP_K, max_batch=1, max_step=16)
    network = write_pool_and_kernels(checkpoint, tmp_path / "cuda", "cuda", "fp32", (), limits, no_progress)
    write_launches(network, tmp_path / "cuda", no_progress)
    graphs = GraphExecutor(
        tmp_path / "cuda",
        network.pool.entries(),
        tmp_path / "cuda" / POOL,
        tmp_path / "cpu" / ADAPTER,
        checkpoint.config,
        CAPACITY,
        np.float32,
    )
    rng = np.random.default_rng(0)
    prompt = CausalStep.chain(0, rng.integers(101, 768, (1, 13)), np.array([0]), np.array([[12]]))
    block = np.full((1, 6), 100)
    block[0, 0] = 300
    draft = BidirectionalStep.block(0, block, np.array([13]), np.arange(6)[None], np.array([6]), np.array([True]))
    for step in (prompt, draft, draft.verification(rng.integers(101, 768, (1, 6)))):
        assert_close(graphs.run(step), executor.run(step))


def assert_close(found: Candidates, expected: Candidates) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (CudaTarget(sms=(75,)), "--sm 75: kernels are compiled for 80, 86, 89, 90, 100, 120, 121"),
        (CudaTarget(sms=(90,)), "int4 in groups of 24; target cuda takes multiples of 16"),
    ],
)
def test_a_refused_build_leaves_nothing(
    random_int4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: CudaTarget, words: str
) -> None:
    checkpoint = Checkpoint(random_int4_checkpoint)
    assert checkpoint.quantization is not None
    odd = checkpoint.quantization.model_copy(update={"group_size": 24})
    monkeypatch.setattr(checkpoint, "quantization", odd)
    with pytest.raises(TriModeError, match=words):
        build_engine(checkpoint, tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []


def test_more_candidates_than_the_kernels_return_are_refused(random_int4_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match="--top-k is 65; kernels of target cuda return at most 64 candidates"):
        build_engine(Checkpoint(random_int4_checkpoint), tmp_path / "out", target=CudaTarget(sms=(90,)), top_k=65)
    assert list(tmp_path.iterdir()) == []
